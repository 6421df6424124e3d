"""Puts this folder on the import path, so that tests share `ranks`; lets SIGINT be tested."""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell has started us in the background, and our children would ignore it as well
    signal.signal(signal.SIGINT, signal.default_int_handler)

"""Puts this folder on the import path, so that tests share `ranks`, and prepares their process."""

from __future__ import annotations

import signal

from hypothesis import settings

# the first example of a process may be the one for which kernels are compiled
settings.register_profile("topq", deadline=None)
settings.load_profile("topq")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell has started us in the background, and our children would ignore it as well
    signal.signal(signal.SIGINT, signal.default_int_handler)

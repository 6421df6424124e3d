"""Processes that fork, as data loaders do, while another of their threads compresses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

FORKING = """
import os, signal, threading
import torch
from topq_dist import Compressor
from topq_dist.compress import layout, residual
from topq_dist.compress.codec import indices
from topq_dist.compress.gpu import engine

held, done = threading.Event(), threading.Event()

def hold():
    with layout._MAKING, residual._MAKING, indices._MAKING, engine._TRYING:
        held.set()
        done.wait()

thread = threading.Thread(target=hold)
thread.start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    compressor, gradient = Compressor(q=0.0, value_format="fp32"), torch.randn(100)
    out = compressor.decompress(compressor.compress("w", gradient), torch.empty(100))
    with engine._TRYING:
        os._exit(0 if torch.equal(out, gradient) and compressor.state_dict() else 1)
_, status = os.waitpid(child, 0)
done.set()
thread.join()
print(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_child_waits_for_no_thread_that_it_has_not() -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKING]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    # -14: the alarm has ended it
    assert ran.stdout.strip() == "0"

"""A parameter server of this machine's own, which ends with the comparison that started it."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from training.connection import without_variables
from training.options import Comparison
from training.torchrun import end_with_parent, ending

# how long it may take to import torch and to read a snapshot, and to drain and to write one
START_S = 60.0
STOP_S = 30.0


class ServerError(Exception):
    """The server did not start, or did not end well. exit_code: its own, negative for a signal."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class _Ended(BaseException):
    """The server ended while it was needed."""


def serve_arguments(options: Comparison, state_dir: Path) -> list[str]:
    """Return the command line of `topq serve` for a comparison, but for its address."""
    training = options.training
    words = ["--state-dir", str(state_dir), "--workers", str(options.ranks), "--mode", "sync"]
    words += ["--inner-opt", training.inner_opt, "--lr", str(training.lr)]
    words += ["--downlink", options.downlink]
    if options.downlink == "topq":
        words += ["--downlink-q", str(options.downlink_q)]
    return words


@contextlib.contextmanager
def local_server(arguments: Sequence[str]) -> Iterator[str]:
    """Run `topq serve ARGUMENTS` on a free loopback port, and give the address in the block.

    Raises ServerError where it does not start, does not live through the block, which is left as
    soon as it dies, or does not end with 0 at its end. Whatever happens, it does not outlive this
    process. For the main thread.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "topq_dist.cli", "serve", "--address", "127.0.0.1:0", *arguments],
        stdout=subprocess.PIPE,
        env=without_variables(os.environ),
        # a terminal's Ctrl-C is ours, and the server's end comes after the workers'
        start_new_session=True,
        preexec_fn=end_with_parent,
    )
    try:
        address = _address(process)
        with _raise_when_ended(process):
            yield address
    except _Ended:
        raise ServerError(f"the server {_how_ended(process)}", process.returncode) from None
    finally:
        _stop(process)
        if process.stdout is not None:
            process.stdout.close()
    if process.returncode != 0:
        raise ServerError(f"the server, asked to end, {_how_ended(process)}", process.returncode)


def _address(process: subprocess.Popen[bytes]) -> str:
    """Return where the server listens, as it says in its first line."""
    if process.stdout is None:
        raise TypeError("process has no stdout: expected a pipe")
    readable, _, _ = select.select([process.stdout], [], [], START_S)
    if not readable:
        raise ServerError(f"the server did not say where it listens within {START_S:g} s", 1)
    said = process.stdout.readline().decode()
    match = re.search(r"\S+:[0-9]+", said)
    if match is None:
        process.wait(STOP_S)
        raise ServerError(f"the server {_how_ended(process)}", process.returncode)
    return match.group()


@contextlib.contextmanager
def _raise_when_ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Raise _Ended in the block as soon as the process has ended."""

    def look(_number: int, _frame: FrameType | None) -> None:
        if process.poll() is not None:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            raise _Ended

    before = signal.signal(signal.SIGCHLD, look)
    try:
        if process.poll() is not None:
            raise _Ended
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    finally:
        # a second signal may have torn the wait
        if process.poll() is None:
            process.kill()
            process.wait()


def _how_ended(process: subprocess.Popen[bytes]) -> str:
    return f"(process {process.pid}) {ending(process.returncode)}"

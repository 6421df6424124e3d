"""The processes that a comparison starts: torchrun's ranks, and a parameter server.

Neither outlives it, and whatever goes wrong in one is told in one clear line.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

# how long a rank that was asked to end may take before it is killed
SHUTDOWN_S = 5
# how long the server may take to import torch and to read a snapshot, and to drain and to write one
SERVER_START_S = 60.0
SERVER_STOP_S = 30.0
_PR_SET_PDEATHSIG = 1


class ProcessError(Exception):
    """A process did not end well. exit_code: its own, negative for a signal."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RankError(ProcessError):
    """A rank failed, and the others were stopped."""


class ServerError(ProcessError):
    """The server did not start, did not live as long as it was needed, or did not end well."""


class _Ended(BaseException):
    """The server ended while it was needed."""


class Stopped(BaseException):
    """SIGINT or SIGTERM was received; exit_code is the shell's for that signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def end_on_signals(program: str) -> None:
    """Make SIGINT or SIGTERM end this process at once, as long as it has nothing to clean up.

    An exception would surface in whatever is being imported, torch above all.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        os.write(2, f"\n{program}: stopped by {name} before training began\n".encode())
        os._exit(128 + number)

    for watched in (signal.SIGINT, signal.SIGTERM):
        signal.signal(watched, end)


def raise_on_signals() -> None:
    """Make the first SIGINT or SIGTERM raise Stopped in the main thread, and ignore the next."""

    def stop(number: int, _frame: FrameType | None) -> None:
        for watched in (signal.SIGINT, signal.SIGTERM):
            # the shutdown that follows must not be torn by an impatient second Ctrl-C
            signal.signal(watched, signal.SIG_IGN)
        raise Stopped(number)

    for watched in (signal.SIGINT, signal.SIGTERM):
        signal.signal(watched, stop)


def run_ranks(ranks: int, command: Sequence[str], *, log_dir: str) -> None:
    """Run `torchrun --standalone --nproc-per-node RANKS COMMAND...` to its end.

    Raises RankError where a rank fails. Whatever happens, no rank outlives the call.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
    from torch.distributed.run import parse_args, run

    arguments = parse_args(  # type: ignore[no-untyped-call]
        [
            "--standalone",
            f"--nproc-per-node={ranks}",
            f"--log-dir={log_dir}",
            f"--shutdown-timeout={SHUTDOWN_S}",
            # SIGINT and SIGTERM are ours: torchrun would hand a SIGINT on as it is, and each rank
            # answer with a traceback
            "--signals-to-handle=SIGHUP,SIGQUIT",
            *command,
        ]
    )

    def blame(item: tuple[int, ProcessFailure]) -> tuple[bool, int]:
        _, failure = item
        # the one that was killed, before those that noticed, before those torchrun then stopped
        killed = failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM
        return not killed, failure.timestamp

    others = _children()
    try:
        with _quiet_log():
            run(arguments)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = min(error.failures.items(), key=blame)
        how = ending(failure.exitcode)
        message = f"rank {rank} (process {failure.pid}) {how}, the other ranks were stopped"
        raise RankError(message, failure.exitcode) from None
    finally:
        _kill(_children() - others)


@contextlib.contextmanager
def _quiet_log() -> Iterator[None]:
    """Keep torchrun's own account of a failure back: ours follows it, in one line."""
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _children() -> set[int]:
    """Return the processes that this one has started."""
    files = Path("/proc/self/task").glob("*/children")
    return {int(child) for file in files for child in file.read_text().split()}


def _kill(processes: set[int]) -> None:
    """Kill ranks that torchrun had started but not yet noted when a signal reached it."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


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
        address = _server_address(process)
        with _raise_when_ended(process):
            yield address
    except _Ended:
        raise ServerError(f"the server {_how_ended(process)}", process.returncode) from None
    finally:
        _stop_server(process)
        if process.stdout is not None:
            process.stdout.close()
    if process.returncode != 0:
        raise ServerError(f"the server, asked to end, {_how_ended(process)}", process.returncode)


def _server_address(process: subprocess.Popen[bytes]) -> str:
    """Return where the server listens, as it says in its first line."""
    if process.stdout is None:
        raise TypeError("process has no stdout: expected a pipe")
    readable, _, _ = select.select([process.stdout], [], [], SERVER_START_S)
    if not readable:
        raise ServerError(f"the server did not say where it listens within {SERVER_START_S:g} s", 1)
    said = process.stdout.readline().decode()
    match = re.search(r"\S+:[0-9]+", said)
    if match is None:
        process.wait(SERVER_STOP_S)
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


def _stop_server(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SERVER_STOP_S)
    finally:
        # a second signal may have torn the wait
        if process.poll() is None:
            process.kill()
            process.wait()


def _how_ended(process: subprocess.Popen[bytes]) -> str:
    return f"(process {process.pid}) {ending(process.returncode)}"


def ending(exit_code: int) -> str:
    """Return how a process ended, in words; exit_code: negative for a signal."""
    if exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"


def end_with_parent() -> None:
    """Have the kernel send this process SIGTERM when its parent ends, even by SIGKILL; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def without_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` without the variables that `topq` and ps_worker.py read."""
    return {name: value for name, value in environment.items() if not name.startswith("TOPQ_")}

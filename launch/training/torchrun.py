"""Runs torchrun within this process, so that its errors and signals end in one clear line."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

# how long a rank that was asked to end may take before it is killed
SHUTDOWN_S = 5
_PR_SET_PDEATHSIG = 1


class RankError(Exception):
    """A rank failed, and the others were stopped. exit_code: the failed rank's, negative for a
    signal."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


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


def ending(exit_code: int) -> str:
    """Return how a process ended, in words; exit_code: negative for a signal."""
    if exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"


def end_with_parent() -> None:
    """Have the kernel send this process SIGTERM when its parent ends, even by SIGKILL; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _children() -> set[int]:
    """Return the processes that this one has started."""
    files = Path("/proc/self/task").glob("*/children")
    return {int(child) for file in files for child in file.read_text().split()}


def _kill(processes: set[int]) -> None:
    """Kill ranks that torchrun had started but not yet noted when a signal reached it."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)

"""Runs torchrun within this process, so that its errors and signals end in one clear line."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

# how long a rank that was asked to end may take before it is killed
SHUTDOWN_S = 5


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

    try:
        with _quiet_log():
            run(arguments)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = min(error.failures.items(), key=blame)
        how = (
            f"was killed by {signal.Signals(-failure.exitcode).name}"
            if failure.exitcode < 0
            else f"ended with exit code {failure.exitcode}"
        )
        message = f"rank {rank} (process {failure.pid}) {how}, the other ranks were stopped"
        raise RankError(message, failure.exitcode) from None
    finally:
        _kill_children()


@contextlib.contextmanager
def _quiet_log() -> Iterator[None]:
    """Keep torchrun's own account of a failure back: ours follows it, in one line."""
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _kill_children() -> None:
    """Kill ranks that torchrun had started but not yet noted when a signal reached it."""
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)

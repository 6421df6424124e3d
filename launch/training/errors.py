"""The errors of the training scripts, each told in one line and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NoReturn


class DataError(Exception):
    """A data set is missing or broken; the message says what to do."""


class CheckpointError(Exception):
    """A checkpoint is missing, broken or another run's."""


class ServerUnfitError(Exception):
    """A server that cannot be asked, or that trains otherwise than the options say."""


def fail(program: str, message: object) -> NoReturn:
    """Exit with 2 after one line on stderr; of torchrun's ranks, only the first one speaks."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"{program}: {message}\n")
    sys.exit(2)


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn bad input into exit code 2 and a lost peer into exit code 1, without a traceback."""
    try:
        yield
    except (CheckpointError, DataError) as error:
        fail(program, error)
    except RuntimeError as error:
        # gloo has no exception of its own for a connection that was cut or timed out
        if "gloo" not in str(error):
            raise
        sys.stderr.write(f"{program}: rank {os.environ['RANK']} lost a peer\n")
        leave(1)


def leave(exit_code: int = 0) -> NoReturn:
    """End this process, whose work is done or lost, without Python's own shutdown.

    With torch 2.13 the threads of a gloo group outlive destroy_process_group once a
    DistributedDataParallel model has used the group; about one shutdown in a hundred then aborts
    in such a thread, and torchrun takes the finished run for a failed one, or a rank that lost a
    peer for the one that failed first.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)

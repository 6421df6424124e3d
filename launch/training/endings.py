"""How a rank ends: in one line where the input is bad or a peer has died, else at once."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

from training.checkpoint import CheckpointError
from training.data import DataError
from training.options import fail


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
        sys.exit(1)


def leave() -> NoReturn:
    """End this process, whose work is done, without Python's own shutdown.

    With torch 2.13 the threads of a gloo group outlive destroy_process_group once a
    DistributedDataParallel model has used the group; about one shutdown in a hundred then aborts
    in such a thread, and torchrun takes the finished run for a failed one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

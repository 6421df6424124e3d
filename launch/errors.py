"""Ends a rank in one line where the cause is bad input or a peer that died."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from checkpoint import CheckpointError
from data import DataError
from options import fail


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

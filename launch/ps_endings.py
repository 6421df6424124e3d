"""How a worker of a parameter server ends: in one line where it must, and with its launcher."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from checkpoint import CheckpointError
from connection import ServerUnfitError
from data import DataError
from options import fail
from torchrun import end_with_parent

from topq_dist.ps.connection import ServerLostError
from topq_dist.ps.protocol import RefusedError


@contextlib.contextmanager
def one_line_errors(program: str, worker: str) -> Iterator[None]:
    """Turn bad input into exit code 2, a lost server or its refusal into 1, without a traceback."""
    try:
        yield
    except (CheckpointError, DataError) as error:
        fail(program, error)
    except (ServerUnfitError, ServerLostError, RefusedError) as error:
        # unlike bad input, this may be one worker's alone: each speaks for itself
        sys.stderr.write(f"{program}: {worker}: {error}\n")
        sys.exit(2 if isinstance(error, ServerUnfitError) else 1)


def end_with_torchrun() -> None:
    """Have the kernel end this process with the torchrun that started it, where one has."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()

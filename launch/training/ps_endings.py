"""How a worker of a parameter server ends: in one line where it must, at once when told to."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

from topq_dist.ps.connection import ServerLostError
from topq_dist.ps.protocol import RefusedError
from training.checkpoint import CheckpointError
from training.connection import ServerUnfitError
from training.data import DataError
from training.options import fail
from training.torchrun import end_with_parent


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


def end_when_told() -> None:
    """Have this process end on SIGTERM, and with the torchrun that started it, where one has."""
    if os.getpid() == 1:
        # in a container: the kernel keeps a signal from process 1 that it has no handler for
        signal.signal(signal.SIGTERM, lambda _number, _frame: os._exit(128 + signal.SIGTERM))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()

"""Ranks of a script, forked from one process that has imported what takes longer than to train.

    PYTHON tests/integrations/forked_ranks.py 2 MODULE,MODULE SCRIPT [ARGUMENT ...]

They have the variables that torchrun sets. The first that fails is the end of all.
"""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path


def run_forked(ranks: int, script: str, arguments: Sequence[str]) -> None:
    """Run a script in as many forks of this process; exits where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    running = set()
    for rank in range(ranks):
        process = os.fork()
        if process == 0:
            place = {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
            place |= {f"LOCAL_{name}": value for name, value in place.items()}
            os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            _be_rank(script, arguments)
        running.add(process)
    while running:
        process, status = os.wait()
        running.remove(process)
        if status:
            for other in running:
                os.kill(other, signal.SIGKILL)
            sys.exit("a rank has failed")


def _be_rank(script: str, arguments: Sequence[str]) -> None:
    sys.argv = [script, *arguments]
    # as Python has it, and what makes processes of its own hands on
    sys.path[0] = str(Path(script).parent)
    failed = True
    try:
        runpy.run_path(script, run_name="__main__")
        failed = False
    except BaseException:  # noqa: BLE001 - this process is to end here, whatever it was
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(failed)


if __name__ == "__main__":
    number, modules, script, *arguments = sys.argv[1:]
    for module in modules.split(","):
        importlib.import_module(module)
    run_forked(int(number), script, arguments)

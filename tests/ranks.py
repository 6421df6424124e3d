"""Real gloo processes for a test: `run_ranks(4, scenario, tmp_path)` returns each rank's answer."""

from __future__ import annotations

import datetime as dt
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forked import FORKED
from torch.multiprocessing.spawn import start_processes

Scenario = Callable[..., Any]
TIMEOUT_S = 60


def run_ranks(world_size: int, scenario: Scenario, folder: Path, *arguments: Any) -> list[Any]:
    """Run `scenario(rank, *arguments)` in `world_size` gloo ranks; return their results.

    A result is anything that torch.load(weights_only=True) reads. A scenario that raises fails
    the test with its traceback.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / "store"
    store.unlink(missing_ok=True)
    start_processes(  # type: ignore[no-untyped-call]
        _rank_main,
        args=(world_size, scenario, folder, arguments),
        nprocs=world_size,
        start_method=FORKED.get_start_method(),
    )
    return [
        torch.load(folder / f"result{rank}.pt", weights_only=True) for rank in range(world_size)
    ]


def error_of(action: Callable[[], object]) -> str:
    """Return the type and text of what an action raises, or "no error"."""
    try:
        action()
    except Exception as error:  # noqa: BLE001 - tests compare type and text
        return f"{type(error).__name__}: {error}"
    return "no error"


def _rank_main(
    rank: int, world_size: int, scenario: Scenario, folder: Path, arguments: tuple[Any, ...]
) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), world_size),
        rank=rank,
        world_size=world_size,
        timeout=dt.timedelta(seconds=TIMEOUT_S),
    )
    try:
        torch.save(scenario(rank, *arguments), folder / f"result{rank}.pt")
    finally:
        dist.destroy_process_group()
    # in Python's shutdown torch's gloo threads abort one process in a hundred
    os._exit(0)

"""Checkpoints that are whole or not there: a folder a step, renamed into place once it is on disk.

    DIR/step-00000200/config.json   what the run is, for people and for checks before the start
                      shared.pt     model, optimizer, history: the same for every rank
                      rank-0.pt     what rank 0 alone knows: its residuals and generator
                      rank-1.pt     ...

A run that dies while it writes leaves step-00000200.tmp, which nothing reads and the next one
removes. All ranks write to one file system; a worker of a parameter server, which has no process
group, writes to a folder of its own as the one rank there is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import nn

from training.errors import CheckpointError
from training.settings import Mode, Training

CHECKPOINTS_TO_KEEP = 2
_CONFIG = "config.json"
_SHARED = "shared.pt"

Config = Mapping[str, Any]


def latest(directory: Path) -> Path | None:
    """Return the newest whole checkpoint in `directory`, or None where there is none."""
    whole = _whole(directory)
    return whole[-1] if whole else None


def step_of(checkpoint: Path) -> int:
    """Return how many steps had been taken when `checkpoint` was written."""
    return int(checkpoint.name.removeprefix("step-"))


def save(
    directory: Path, step: int, *, config: Config, shared: dict[str, Any], own: dict[str, Any]
) -> None:
    """Write a checkpoint; a collective where there is a process group, else of this process alone.

    `shared` and `config` are taken from rank 0.
    Whatever kills the run, the newest whole checkpoint stays the last one or becomes this one.
    """
    together = dist.is_initialized()
    rank = dist.get_rank() if together else 0
    partial = directory / f"step-{step:08d}.tmp"
    if rank == 0:
        for torn in directory.glob("step-*.tmp"):
            shutil.rmtree(torn)
        partial.mkdir(parents=True)
    if together:
        dist.barrier()
    _write(partial / _rank_file(rank), lambda file: torch.save(own, file))
    if rank == 0:
        _write(partial / _SHARED, lambda file: torch.save(shared, file))
        text = json.dumps(dict(config), indent=1)
        _write(partial / _CONFIG, lambda file: file.write(text.encode()))
    if together:
        dist.barrier()
    if rank == 0:
        _sync_folder(partial)
        partial.rename(partial.with_suffix(""))
        _sync_folder(directory)
        for old in _whole(directory)[:-CHECKPOINTS_TO_KEEP]:
            # under its own name, a half-removed checkpoint would pass for a whole one
            doomed = old.with_suffix(".tmp")
            old.rename(doomed)
            shutil.rmtree(doomed)


def check(checkpoint: Path, config: Config) -> None:
    """Raise CheckpointError, naming both sides, unless `checkpoint` is of the run `config` is."""
    try:
        written = json.loads((checkpoint / _CONFIG).read_bytes())
        if not isinstance(written, dict):
            raise TypeError(f"{_CONFIG} holds a {type(written).__name__}")
    except (OSError, ValueError, TypeError) as error:
        raise _broken(checkpoint, error) from error
    # what json makes of it, so that tuples and lists compare equal
    expected = json.loads(json.dumps(dict(config)))
    differences = _differences(written, expected)
    if differences:
        raise CheckpointError(
            f"checkpoint {checkpoint} is of another run: "
            + "; ".join(f"{what} {there}, here {here}" for what, there, here in differences)
        )


def check_files(
    checkpoint: Path, ranks: int, *, shared: AbstractSet[str], own: AbstractSet[str]
) -> None:
    """Raise CheckpointError, naming the file, unless every rank could `load` these keys."""
    parts = {_SHARED: shared, **{_rank_file(rank): own for rank in range(ranks)}}
    for name, keys in parts.items():
        missing = sorted(keys - _read(checkpoint, name).keys())
        if missing:
            raise _broken(checkpoint, f"{name} lacks {', '.join(missing)}")


def load(checkpoint: Path, rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (shared, own) as `save` was given them on `rank`; raises CheckpointError."""
    return _read(checkpoint, _SHARED), _read(checkpoint, _rank_file(rank))


def run_config(training: Training, mode: Mode, ranks: int, model: nn.Module) -> dict[str, Any]:
    """Return what two runs must share for one to go on from the other's"""
    config = {
        "data": training.data,
        "mode": mode,
        "ranks": ranks,
        "q": training.q,
        "inner optimizer": training.inner_opt,
        "learning rate": training.lr,
        "batch size": training.batch_size,
        "seed": training.seed,
        "model": {name: list(value.shape) for name, value in model.state_dict().items()},
    }
    if training.lr_schedule == "linear":
        # another number of steps is another learning rate in each
        config |= {"learning rate schedule": "linear", "steps": training.steps}
    if mode == "dense":
        del config["q"]
    return config


def checkpoint_folder(folder: Path, mode: Mode, worker: str | None = None) -> Path:
    """Return where `mode` keeps its checkpoints in `folder`: on a server, each worker its own."""
    return folder / mode if worker is None else folder / mode / "workers" / worker


def server_folder(folder: Path) -> Path:
    """Return where the parameter server of a comparison keeps its state in `folder`."""
    return folder / "ps" / "server"


def checkpoint_to_resume(training: Training, folder: Path, config: Config) -> Path | None:
    """Return the checkpoint in `folder` to go on from, or None for a run from the beginning.

    Raises CheckpointError where the newest one is another run's, where --resume finds none, and
    where there is one without --resume.
    """
    newest = latest(folder)
    if newest is None:
        if training.resume:
            raise CheckpointError(f"--resume: expected a checkpoint in {folder}")
        return None
    if not training.resume:
        raise CheckpointError(
            f"{newest} is there already: expected --resume to go on from it, or another folder"
        )
    check(newest, config)
    if step_of(newest) > training.steps:
        raise CheckpointError(
            f"{newest} is past --steps {training.steps}: expected at least {step_of(newest)}"
        )
    return newest


def _differences(written: Config, expected: Config) -> list[tuple[str, Any, Any]]:
    differences: list[tuple[str, Any, Any]] = []
    for key in {**expected, **written}:
        there, here = written.get(key, "unknown"), expected.get(key, "unknown")
        if there == here:
            continue
        if isinstance(there, dict) and isinstance(here, dict):
            # of a whole other model the first difference says enough
            differences.append(
                next(
                    (f"{key} {name}", there.get(name, "absent"), here.get(name, "absent"))
                    for name in {**here, **there}
                    if there.get(name) != here.get(name)
                )
            )
        else:
            differences.append((key, there, here))
    return differences


def _whole(directory: Path) -> list[Path]:
    found = (p for p in directory.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name))
    return sorted(found, key=step_of)


def _rank_file(rank: int) -> str:
    return f"rank-{rank}.pt"


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    with path.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(checkpoint: Path, name: str) -> dict[str, Any]:
    try:
        content = torch.load(checkpoint / name, weights_only=True)
    except Exception as error:  # torch.load raises nearly anything for bytes that are no archive
        raise _broken(checkpoint, f"{name}: {error}") from error
    if not isinstance(content, dict):
        raise _broken(checkpoint, f"{name} holds a {type(content).__name__}")
    return content


def _broken(checkpoint: Path, cause: object) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {checkpoint} cannot be read ({cause}): remove it to resume from the one before"
    )

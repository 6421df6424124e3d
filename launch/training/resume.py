"""Where a run keeps its checkpoints, what must fit to go on from one, and which one it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from training import checkpoint
from training.options import Mode, Training


def run_config(training: Training, mode: Mode, ranks: int, model: nn.Module) -> dict[str, Any]:
    """Return what two runs must share for one to go on from the other's checkpoint."""
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


def checkpoint_to_resume(
    training: Training, folder: Path, config: checkpoint.Config
) -> Path | None:
    """Return the checkpoint in `folder` to go on from, or None for a run from the beginning.

    Raises CheckpointError where the newest one is another run's, where --resume finds none, and
    where there is one without --resume.
    """
    newest = checkpoint.latest(folder)
    if newest is None:
        if training.resume:
            raise checkpoint.CheckpointError(f"--resume: expected a checkpoint in {folder}")
        return None
    if not training.resume:
        raise checkpoint.CheckpointError(
            f"{newest} is there already: expected --resume to go on from it, or another folder"
        )
    checkpoint.check(newest, config)
    if checkpoint.step_of(newest) > training.steps:
        raise checkpoint.CheckpointError(
            f"{newest} is past --steps {training.steps}: "
            f"expected at least {checkpoint.step_of(newest)}"
        )
    return newest

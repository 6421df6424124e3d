"""What surrounds the training loop: where it starts, what it leaves behind, what it reports."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoint
import torch
import torch.distributed as dist
from data import Data, batch_indices
from models import cross_entropy, evaluate
from options import Mode, Rank, Training
from result import MODE_NAMES, Result
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from topq_dist import TopQState

# what _save writes and _resume reads
SHARED_KEYS = frozenset({"model", "optimizer", "losses", "sent_bytes", "train_s"})
OWN_KEYS = frozenset({"topq", "generator"})


class Run:
    """One rank's training run. `state` is the top-Q hook's, or None for dense DDP.

    Raises CheckpointError, before anything is touched, where --checkpoint does not fit.
    """

    def __init__(
        self,
        options: Rank,
        data: Data,
        model: DistributedDataParallel,
        optimizer: torch.optim.Optimizer,
        state: TopQState | None,
    ) -> None:
        self._options = options
        self._training = options.training
        self._data = data
        self._model = model
        self._optimizer = optimizer
        self._state = state
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._config = run_config(options.training, options.mode, self._ranks, model.module)
        self._gradient_bytes = sum(
            p.numel() * p.element_size() for p in model.parameters() if p.requires_grad
        )
        self._losses: list[float] = []
        self._sent_bytes: list[int] = []
        self._earlier_s = 0.0
        self._started_s = 0.0
        start = checkpoint_to_resume(options.training, options.mode, self._config)
        if start is not None:
            self._resume(start)

    def steps(self) -> Iterator[int]:
        """Yield the number of each step to take, with a progress bar on rank 0's terminal."""
        bar = tqdm(
            range(len(self._losses), self._training.steps),
            initial=len(self._losses),
            total=self._training.steps,
            desc=MODE_NAMES[self._options.mode].ljust(9),
            unit="step",
            # None: only where stderr is a terminal
            disable=None if self._rank == 0 else True,
        )
        self._started_s = time.perf_counter()
        for step in bar:
            yield step
            bar.set_postfix(loss=f"{self._losses[-1]:.3f}", refresh=False)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return this rank's (inputs, targets) of `step`."""
        indices = batch_indices(
            len(self._data.train_inputs),
            seed=self._training.seed,
            step=step,
            rank=self._rank,
            ranks=self._ranks,
            batch_size=self._training.batch_size,
        )
        return self._data.train_inputs[indices], self._data.train_targets[indices]

    def record(self, step: int, loss: Tensor) -> None:
        """Note what `step` came to, and write a checkpoint where one is due."""
        self._losses.append(float(loss))
        # without a hook, DDP hands every gradient to its all-reduce as it is
        dense_bytes = (step + 1) * self._gradient_bytes
        self._sent_bytes.append(self._state.stats().sent_bytes if self._state else dense_bytes)
        done = step + 1
        if self._training.checkpoint is not None and (
            done % self._training.checkpoint_every == 0 or done == self._training.steps
        ):
            self._save(checkpoint_folder(self._training.checkpoint, self._options.mode), done)

    def finish(self) -> Result | None:
        """Test the model and report on rank 0; None on the others."""
        train_s = self._elapsed_s()
        if self._rank != 0:
            return None
        module = self._model.module
        accuracy, loss = evaluate(module, self._data.test_inputs, self._data.test_targets)
        stats = self._state.stats() if self._state else None
        result = Result(
            mode=self._options.mode,
            data=self._training.data,
            ranks=self._ranks,
            q=self._training.q if self._state else None,
            inner_opt=self._training.inner_opt,
            lr=self._training.lr,
            batch_size=self._training.batch_size,
            seed=self._training.seed,
            steps=self._training.steps,
            parameters=sum(p.numel() for p in module.parameters()),
            parameters_sha256=parameters_sha256(module),
            test_accuracy=accuracy,
            test_loss=loss,
            dense_bytes=stats.dense_bytes if stats else self._sent_bytes[-1],
            select_s=stats.select_s if stats else None,
            wait_s=stats.wait_s if stats else None,
            train_s=train_s,
            losses=self._losses,
            sent_bytes=self._sent_bytes,
        )
        if self._options.result is not None:
            result.write(self._options.result)
        return result

    def _elapsed_s(self) -> float:
        return self._earlier_s + time.perf_counter() - self._started_s

    def _save(self, folder: Path, step: int) -> None:
        checkpoint.save(
            folder,
            step,
            config=self._config,
            shared={
                "model": self._model.module.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "losses": self._losses,
                "sent_bytes": self._sent_bytes,
                "train_s": self._elapsed_s(),
            },
            own={
                "topq": self._state.state_dict() if self._state else {},
                "generator": torch.get_rng_state(),
            },
        )

    def _resume(self, start: Path) -> None:
        shared, own = checkpoint.load(start, self._rank)
        # DDP lays its buckets out anew after the first backward pass, and float sums depend on
        # that layout: a pass whose outcome is thrown away gives us that of the run we go on with
        inputs, targets = self.batch(0)
        cross_entropy(self._model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        self._optimizer.zero_grad()

        self._model.module.load_state_dict(shared["model"])
        self._optimizer.load_state_dict(shared["optimizer"])
        if self._state:
            self._state.load_state_dict(own["topq"])
        torch.set_rng_state(own["generator"])
        self._losses, self._sent_bytes = shared["losses"], shared["sent_bytes"]
        self._earlier_s = shared["train_s"]


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
    if mode == "dense":
        del config["q"]
    return config


def checkpoint_folder(folder: Path, mode: Mode) -> Path:
    """Return where `mode` keeps its checkpoints in `folder`."""
    return folder / mode


def checkpoint_to_resume(training: Training, mode: Mode, config: checkpoint.Config) -> Path | None:
    """Return the checkpoint to go on from, or None for a run from the beginning.

    Raises CheckpointError where the newest one is another run's, where --resume finds none, and
    where there is one without --resume.
    """
    if training.checkpoint is None:
        return None
    folder = checkpoint_folder(training.checkpoint, mode)
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


def parameters_sha256(model: nn.Module) -> str:
    """Return the SHA-256 of the parameters' bytes, in the order of their registration."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()

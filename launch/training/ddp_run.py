"""The run of a DistributedDataParallel model, with dense or with top-Q gradients."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from topq_dist import Stats, TopQState
from training import checkpoint
from training.checkpoint import checkpoint_folder, run_config
from training.data import Data
from training.models import cross_entropy
from training.report import Result
from training.run import HISTORY_KEYS, Run
from training.settings import Rank

# what _save writes and _resume reads
SHARED_KEYS = HISTORY_KEYS | {"model", "optimizer"}
OWN_KEYS = frozenset({"topq", "generator"})


class DdpRun(Run):
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
        training, ranks = options.training, dist.get_world_size()
        super().__init__(
            options,
            data,
            model.module,
            rank=dist.get_rank(),
            ranks=ranks,
            config=run_config(training, options.mode, ranks, model.module),
            folder=training.checkpoint and checkpoint_folder(training.checkpoint, options.mode),
        )
        self._model = model
        self._optimizer = optimizer
        self._state = state
        self._gradient_bytes = sum(
            p.numel() * p.element_size() for p in model.parameters() if p.requires_grad
        )
        if self._start is not None:
            self._resume(self._start)

    def finish(self) -> Result | None:
        """Test the model and report on rank 0; None on the others."""
        if self._rank != 0:
            return None
        result = self._result()
        if self._options.result is not None:
            result.write(self._options.result)
        return result

    def _stats(self, steps: int) -> Stats:
        if self._state:
            return self._state.stats()
        # without a hook, DDP hands every gradient to its all-reduce as it is
        dense_bytes = steps * self._gradient_bytes
        return Stats(steps=steps, sent_bytes=dense_bytes, dense_bytes=dense_bytes)

    def _received(self, stats: Stats) -> int | None:
        # an all-reduce returns as much as it was handed; what frames other ranks sent, none counts
        return None if self._state else stats.sent_bytes

    def _save(self, folder: Path, step: int) -> None:
        checkpoint.save(
            folder,
            step,
            config=self._config,
            shared={
                "model": self._model.module.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                **self._history(),
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
        self._go_on_from(shared)

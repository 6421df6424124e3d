"""W ranks that train as one process with local steps: the replicas of LocalTopQ, and no group.

Each rank has a model, an optimizer and a replica of its own; what an all-gather would bring is
there already. tests/benchmarks/test_local_ranks.py holds it against LocalTopQ, to the bit.
"""

from __future__ import annotations

import copy
import statistics

import torch
from emulated_ranks import Method, make_scheduler
from tasks import Task, loss_of
from torch import Tensor, nn

from topq_dist.compress.aggregate import average
from topq_dist.compress.compressor import TopKCompressor
from topq_dist.local.replica import Replica, Round
from topq_dist.local.settings import make_settings
from topq_dist.validation import check_fraction


class LocalRanks:
    """The ranks of one run; `step` is what all of them do in a step.

    dense_bytes, sent_bytes: what DDP would have sent in all steps, and one rank's whole frames.
    """

    def __init__(
        self, task: Task, model: nn.Module, method: Method, *, workers: int, steps: int
    ) -> None:
        self.dense_bytes = self.sent_bytes = 0
        self._settings = make_settings(
            every=method.every,
            outer_lr=method.outer_lr,
            outer_momentum=method.outer_momentum,
            nesterov=method.nesterov,
            fragments=method.fragments,
            offsets=None,
            overlap=method.overlap,
            blend=method.blend,
            buffers="first",
        )
        self._models = [model, *(copy.deepcopy(model) for _ in range(workers - 1))]
        self._numel = sum(parameter.numel() for parameter in model.parameters())
        self._optimizers = [
            task.make_optimizer(mine, lr=task.lr * method.lr, momentum=method.beta)
            for mine in self._models
        ]
        self._schedulers = [make_scheduler(task, one, steps) for one in self._optimizers]
        self._replicas = [
            Replica(
                dict(mine.named_parameters()),
                self._settings,
                TopKCompressor(
                    value_format=method.value_format,
                    error_feedback=True,
                    bound=method.bound,
                    residual_decay=method.residual_decay,
                ),
                q=check_fraction("q", method.q),
            )
            for mine in self._models
        ]
        # by the step that receives them, each with the frames that travel
        self._under_way: list[tuple[int, list[Round], list[Tensor]]] = []

    def step(self, batches: list[tuple[Tensor, Tensor]], step: int) -> float:
        """Take one inner step on every rank and return the mean loss."""
        losses = []
        for model, optimizer, scheduler, batch in zip(
            self._models, self._optimizers, self._schedulers, batches, strict=True
        ):
            optimizer.zero_grad()
            loss = loss_of(model, *batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
            losses.append(float(loss.detach()))
        self.dense_bytes += 4 * self._numel
        with torch.no_grad():
            self._end_step(step + 1)
        return statistics.fmean(losses)

    @torch.no_grad()
    def synchronize(self) -> None:
        """Exchange what is left; afterwards the first rank's model is everyone's."""
        self._receive(None)
        for fragment in range(len(self._replicas[0].fragments)):
            self._begin(fragment, 0)
        self._receive(None)
        for replica in self._replicas:
            for mine in replica.fragments:
                mine.take_up(None)

    def _end_step(self, step: int) -> None:
        self._receive(step)
        for fragment in range(len(self._replicas[0].fragments)):
            if self._settings.due(fragment, step):
                self._begin(fragment, step + self._settings.overlap)
        self._receive(step)
        if step % self._settings.every == 0:
            for model in self._models[1:]:
                for mine, first in zip(model.buffers(), self._models[0].buffers(), strict=True):
                    mine.copy_(first)

    def _begin(self, fragment: int, received_at: int) -> None:
        rounds, frames = [], []
        for replica in self._replicas:
            begun = replica.begin(fragment)
            compressed = replica.compress(begun)
            # a round on real ranks is received later, but what it brings is fixed by now
            replica.compressor.residuals.apply(compressed.update)
            rounds.append(begun)
            frames += compressed.frames
        self.sent_bytes += frames[0].numel()
        self._under_way.append((received_at, rounds, frames))

    def _receive(self, step: int | None) -> None:
        due = [one for one in self._under_way if step is None or one[0] <= step]
        self._under_way = [one for one in self._under_way if one not in due]
        for _, rounds, frames in due:
            for replica, begun in zip(self._replicas, rounds, strict=True):
                average(frames, out=begun.vector)
                replica.finish(begun)

"""W ranks that train as one process: the hook's own parts, without a process group between them.

Every rank has a compressor, residuals and batches of its own; what an all-gather would bring is
there already. tests/benchmarks/test_convergence.py holds it against DistributedDataParallel with
the hook, parameter by parameter and to the bit.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from tasks import Batches, Task, evaluate, loss_of
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from topq_dist.compress.aggregate import average
from topq_dist.compress.coherence import total
from topq_dist.compress.compressor import TopKCompressor
from topq_dist.compress.defaults import DEFAULT_BOUND, DEFAULT_Q, DEFAULT_VALUE_FORMAT
from topq_dist.compress.layout import Layout
from topq_dist.compress.planned_segments import PlannedSegments
from topq_dist.hook.momentum import MomentumName
from topq_dist.hook.momentum_choice import make_momentum
from topq_dist.q_policies import QPolicy

_MOMENTUM = 0.9
# samples of a point of a curve
_CURVE = 1000
Kind = Literal["dense", "topq", "powersgd", "fp16", "local"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to exchange gradients.

    q (a policy too), value_format, momentum, bound, keep_rate, adapt_rate: of the hook. rank: of
    PowerSGD. lr: times the task's rate. beta: the optimizer's own momentum or beta1; SGD's rate
    goes with it, so that rate / (1 - momentum) stays what it is at 0.9.
    warm: (part of the steps, q in them).
    every, residual_decay, outer_lr, outer_momentum, nesterov, fragments, overlap, blend: of
        LocalTopQ, whose inner steps have `beta`, for the kind "local".
    """

    name: str
    kind: Kind = "topq"
    q: float | QPolicy = DEFAULT_Q
    value_format: str | None = DEFAULT_VALUE_FORMAT
    momentum: MomentumName = "feedback"
    bound: float | None = DEFAULT_BOUND
    keep_rate: bool = True
    adapt_rate: bool = True
    rank: int = 1
    beta: float = _MOMENTUM
    lr: float = 1.0
    warm: tuple[float, float] | None = None
    every: int = 1
    residual_decay: float = 0.95
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    nesterov: bool = False
    fragments: int = 1
    overlap: int = 0
    blend: float | None = None

    def q_at(self, step: int, steps: int) -> float | QPolicy:
        """Return the q of a step, or its policy."""
        if self.warm is not None and step < self.warm[0] * steps:
            return self.warm[1]
        return self.q


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run came to. ratio: dense bytes over the bytes of a rank's frames, all steps counted.

    sent_bytes: of those frames, all steps counted.
    curve: (step, validation quality) on the way, where it was asked for.
    """

    validation: float
    test: float
    train_loss: float
    highest_loss: float
    ratio: float
    sent_bytes: int
    curve: list[tuple[int, float]]


def train(
    task: Task,
    data: Any,
    method: Method,
    *,
    seed: int,
    workers: int,
    steps: int,
    evaluate_every: int | None = None,
    progress: Callable[[int], None] = lambda step: None,
) -> Outcome:
    """Train one model with `workers` ranks."""
    torch.manual_seed(seed)
    model = task.model(data)
    group = _ranks(task, model, method, workers=workers, steps=steps)
    batches = Batches(task, data, seed=seed, workers=workers, steps=steps)
    losses, curve = [], []
    for step in range(steps):
        losses.append(group.step([batches.take(step, rank) for rank in range(workers)], step))
        if evaluate_every and (step + 1) % evaluate_every == 0:
            curve.append((step + 1, evaluate(task, model, data, "validation", limit=_CURVE)))
        progress(step + 1)
    group.synchronize()
    return Outcome(
        validation=evaluate(task, model, data, "validation"),
        test=evaluate(task, model, data, "test"),
        train_loss=statistics.fmean(losses[-50:]),
        highest_loss=max((x if math.isfinite(x) else math.inf for x in losses), default=math.nan),
        ratio=group.dense_bytes / group.sent_bytes,
        sent_bytes=group.sent_bytes,
        curve=curve,
    )


class AnyRanks(Protocol):
    """Ranks that train together."""

    dense_bytes: int
    sent_bytes: int

    def step(self, batches: list[tuple[Tensor, Tensor]], step: int) -> float:
        """Take one step on every rank and return the mean loss."""

    def synchronize(self) -> None:
        """Have the first rank's model be everyone's."""


def _ranks(task: Task, model: nn.Module, method: Method, *, workers: int, steps: int) -> AnyRanks:
    if method.kind != "local":
        return Ranks(task, model, method, workers=workers, steps=steps)
    # late, since it is made of what is here
    from local_ranks import LocalRanks

    return LocalRanks(task, model, method, workers=workers, steps=steps)


class Ranks:
    """The ranks of one run; `step` is what all of them do in a step."""

    def __init__(
        self, task: Task, model: nn.Module, method: Method, *, workers: int, steps: int
    ) -> None:
        self._model, self._method, self._steps = model, method, steps
        self._parameters = list(model.parameters())
        names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        self._layout = Layout(
            names=tuple(names.values()),
            shapes=tuple(tuple(parameter.shape) for parameter in self._parameters),
        )
        numel = self._layout.numel
        self._flats = [torch.zeros(numel) for _ in range(workers)]
        self._average = torch.zeros(numel)
        lr = task.lr * method.lr
        if task.optimizer == "sgd" and method.beta != _MOMENTUM:
            lr *= (1 - method.beta) / (1 - _MOMENTUM)
        self._optimizer = task.make_optimizer(model, lr=lr, momentum=method.beta)
        self._scheduler = make_scheduler(task, self._optimizer, steps)
        self.dense_bytes = self.sent_bytes = 0
        self._norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        self._powersgd = None
        if method.kind == "powersgd":
            self._powersgd = PowerSgd(self._layout, method.rank, workers)
        shapes = dict(zip(self._layout.names, self._layout.shapes, strict=True))
        self._planned = PlannedSegments(method.q, "parameter", shapes, method.value_format)
        self._compressors: list[TopKCompressor] = []
        if method.kind == "topq":
            self._compressors = [
                TopKCompressor(
                    value_format=method.value_format,
                    error_feedback=True,
                    bound=method.bound,
                )
                for _ in range(workers)
            ]
            self._momenta = [
                make_momentum(
                    method.momentum,
                    self._optimizer,
                    names,
                    compressor.residuals,
                    mask_velocity=True,
                    keep_rate=method.keep_rate,
                    adapt_rate=method.adapt_rate,
                    summed_ranks=1,
                    half=(),
                )
                for compressor in self._compressors
            ]
            # the ranks share their optimizer, which one of them acts on
            self._momenta[0].attach()

    def step(self, batches: list[tuple[Tensor, Tensor]], step: int) -> float:
        """Take one step and return the mean loss."""
        losses = []
        for rank, (inputs, targets) in enumerate(batches):
            self._show(self._flats[rank].zero_())
            for norm in self._norms:
                # DDP hands out the first rank's running statistics
                norm.momentum = 0.1 if rank == 0 else 0.0
            loss = loss_of(self._model, inputs, targets)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(float(loss.detach()))
        self._exchange(step)
        self._show(self._average)
        self._optimizer.step()
        self._scheduler.step()
        return statistics.fmean(losses)

    def synchronize(self) -> None:
        """Do nothing: the ranks share their model."""

    def _show(self, flat: Tensor) -> None:
        for parameter, where in zip(self._parameters, self._layout.slices(), strict=True):
            parameter.grad = flat[where].view(parameter.shape)

    def _exchange(self, step: int) -> None:
        dense_bytes = 4 * self._layout.numel
        self.dense_bytes += dense_bytes
        if self._compressors:
            self._exchange_frames(step)
            return
        if self._powersgd is not None:
            self.sent_bytes += self._powersgd.average(self._flats, self._average)
            return
        # torch's fp16_compress_hook divides and adds in half precision
        half = self._method.kind == "fp16"
        self.sent_bytes += dense_bytes // 2 if half else dense_bytes
        shares = [(flat.half() if half else flat) / len(self._flats) for flat in self._flats]
        self._average.copy_(sum(shares[1:], shares[0]))

    def _exchange_frames(self, step: int) -> None:
        planned = self._planned
        if planned.q != (q := self._method.q_at(step, self._steps)):
            planned.q = q
        planned.step = step
        segments = planned.of(self._layout.names)
        sent = sum(segment.k for segment in segments) / self._layout.numel
        compressed = []
        for flat, compressor, momentum in zip(
            self._flats, self._compressors, self._momenta, strict=True
        ):
            momentum.begin_step(sparse=True, sent_fraction=sent, skip_unused=False)
            done = momentum.compress(
                compressor, flat, self._layout, self._parameters, segments, parts=1
            )
            compressed.append(done)
            self.sent_bytes += done.frames[0].numel()
        self.sent_bytes -= sum(c.frames[0].numel() for c in compressed[1:])
        average([done.frames[0] for done in compressed], out=self._average)
        coherence = total(done.coherence for done in compressed)
        for momentum in self._momenta:
            # of which the first alone acts on the optimizer
            momentum.end_step(coherence)
        for compressor, done in zip(self._compressors, compressed, strict=True):
            compressor.residuals.apply(done.update)


class PowerSgd:
    """Vogels et al., "PowerSGD" (NeurIPS 2019), algorithm 2, as torch's hook does it: warm start,
    error feedback, one power iteration; tensors of one dimension travel whole."""

    def __init__(self, layout: Layout, rank: int, workers: int) -> None:
        self._layout = layout
        self._errors = [torch.zeros(layout.numel) for _ in range(workers)]
        generator = torch.Generator().manual_seed(0)
        self._right = {
            name: torch.randn(math.prod(shape[1:]), rank, generator=generator)
            for name, shape in zip(layout.names, layout.shapes, strict=True)
            if len(shape) > 1 and rank * (shape[0] + math.prod(shape[1:])) < math.prod(shape)
        }

    def average(self, flats: list[Tensor], out: Tensor) -> int:
        """Write the compressed average into `out`; return the bytes that a rank sends."""
        sent = 0
        for flat, error in zip(flats, self._errors, strict=True):
            flat.add_(error)
        for name, shape, where in zip(
            self._layout.names, self._layout.shapes, self._layout.slices(), strict=True
        ):
            mean = torch.stack([flat[where] for flat in flats]).mean(0)
            if name in self._right:
                matrix = mean.view(shape[0], -1)
                left = torch.linalg.qr(matrix @ self._right[name]).Q
                right = matrix.T @ left
                self._right[name] = right
                mean = (left @ right.T).reshape(-1)
                sent += 4 * (left.numel() + right.numel())
            else:
                sent += 4 * mean.numel()
            out[where] = mean
        for flat, error in zip(flats, self._errors, strict=True):
            torch.sub(flat, out, out=error)
            for name, where in zip(self._layout.names, self._layout.slices(), strict=True):
                if name not in self._right:
                    error[where] = 0.0
        return sent


def make_scheduler(task: Task, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """Return the scheduler of a run of so many steps."""
    if task.schedule == "onecycle":
        return OneCycleLR(optimizer, max_lr=optimizer.param_groups[0]["lr"], total_steps=steps + 1)
    warm = max(1, round(0.05 * steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.05 + 0.475 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return LambdaLR(optimizer, factor)

"""A model's own step, and what each method adds to it, measured among mirrors of this rank."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from topq_dist.advice.mirror import MirrorGroup
from topq_dist.advice.mirrored_split import register_mirrored_split
from topq_dist.advice.time_model import Method, Traffic
from topq_dist.compress.defaults import DEFAULT_BOUND
from topq_dist.ddp.hook import TopQState, topq_hook
from topq_dist.hook.parts import Knobs
from topq_dist.local.local_topq import LocalTopQ

# DDP rebuilds its buckets after the first, PowerSGD starts with the third, slots and thresholds
# adapt
_WARM_UP_STEPS = 4
_POWERSGD_START_STEP = 2
# of local steps
_PERIODS = 2


@dataclass(frozen=True, kw_only=True)
class Training:
    """A bare model, what returns its loss on a batch, and the optimizer that steps it."""

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]
    optimizer: Optimizer

    @property
    def device(self) -> torch.device:
        """The device of the model's first parameter."""
        return next(self.model.parameters()).device

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put parameters, buffers, the optimizer's state and random numbers back after a block."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        before = [tensor.detach().clone() for tensor in tensors]
        state = copy.deepcopy(self.optimizer.state_dict())
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)
            self.optimizer.load_state_dict(state)
            self.optimizer.zero_grad(set_to_none=True)

    def step_s(self, model: nn.Module, step: Callable[[], object]) -> float:
        """Return the seconds of one step of the model, wrapped as given; `step` ends it."""
        began_s = self._now_s()
        self.optimizer.zero_grad()
        loss = self.loss(model)
        torch.autograd.backward(loss)
        step()
        took_s = self._now_s() - began_s
        if not bool(torch.isfinite(loss.detach()).all()):
            raise ValueError(f"loss returned {loss.detach()}: expected a finite loss")
        return took_s

    def _now_s(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Measured(NamedTuple):
    """What a method adds to a step in seconds, and hands over from one exchange to the next.

    bare_s: the steps beside it, which exchanged nothing.
    """

    engine_s: float
    bare_s: tuple[float, ...]
    traffic: tuple[Traffic, ...]


def bare_steps_s(training: Training, steps: int) -> list[float]:
    """Return the seconds of so many steps that exchange nothing."""
    with training.restored():
        took_s = [
            training.step_s(training.model, training.optimizer.step)
            for _ in range(_WARM_UP_STEPS + steps)
        ]
    return took_s[_WARM_UP_STEPS:]


def step_with(training: Training, method: Method, *, world_size: int, steps: int) -> Measured:
    """Return what a method adds to a step on a link without delay, and its traffic.

    The seconds are the difference of medians of `steps` with it and as many without, in turn, since
    no machine is equally fast for long; of local steps that of the means of whole periods, as many
    as fit into these and two at least.
    """
    backend = "nccl" if training.device.type == "cuda" else "gloo"
    mirror = MirrorGroup(world_size, backend=backend)
    try:
        with training.restored():
            if method.kind == "local steps":
                return _local_steps(training, method, mirror, max(_PERIODS, steps // method.every))
            return _hooked_steps(training, method, mirror, steps)
    finally:
        mirror.leave()
        # the reducer of a model that is gone would still hang on its parameters
        gc.collect()


def _hooked_steps(training: Training, method: Method, mirror: MirrorGroup, steps: int) -> Measured:
    with _hooked(training, method, mirror) as model:
        took_s: list[float] = []
        bare_s: list[float] = []
        for _ in range(_WARM_UP_STEPS + steps):
            # not under no_sync, after which DistributedDataParallel leaves buffers as they are
            bare_s.append(training.step_s(training.model, training.optimizer.step))
            mirror.take_traffic()
            aside_s = mirror.aside_s
            step_s = training.step_s(model, training.optimizer.step)
            took_s.append(step_s - (mirror.aside_s - aside_s))
    return _beside(took_s[_WARM_UP_STEPS:], bare_s[_WARM_UP_STEPS:], mirror.take_traffic())


@contextmanager
def _hooked(
    training: Training, method: Method, mirror: MirrorGroup
) -> Iterator[DistributedDataParallel]:
    model = DistributedDataParallel(training.model, process_group=mirror)
    if method.kind == "fp16":
        model.register_comm_hook(mirror, default_hooks.fp16_compress_hook)
    if method.kind == "PowerSGD":
        state = powerSGD_hook.PowerSGDState(
            process_group=mirror,
            matrix_approximation_rank=method.power_rank or 1,
            start_powerSGD_iter=_POWERSGD_START_STEP,
        )
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    if method.kind != "top-Q":
        yield model
    elif method.exchange == "split":
        knobs = Knobs(q=method.q, value_format=method.value_format, exchange="split")
        parts = register_mirrored_split(model, training.optimizer, knobs, mirror)
        try:
            yield model
        finally:
            parts.stages.momentum.detach()
    else:
        hook = TopQState(
            model,
            training.optimizer,
            q=method.q,
            value_format=method.value_format,
            exchange="allgather",
        )
        model.register_comm_hook(hook, topq_hook)
        try:
            yield model
        finally:
            hook.detach()


def _local_steps(training: Training, method: Method, mirror: MirrorGroup, periods: int) -> Measured:
    local = LocalTopQ(
        training.model,
        training.optimizer,
        every=method.every,
        q=method.q or 0.0,
        value_format=method.value_format,
        bound=DEFAULT_BOUND,
        residual_decay=1.0,
        process_group=mirror,
    )
    period_s: list[float] = []
    bare_s: list[float] = []
    # the first one touches memory for the first time, and its frame has no slot yet
    for _ in range(1 + periods):
        bare_s.append(_mean_step_s(training, training.optimizer.step, method.every))
        mirror.take_traffic()
        period_s.append(_mean_step_s(training, local.step, method.every))
    return _beside(period_s[1:], bare_s[1:], mirror.take_traffic())


def _mean_step_s(training: Training, step: Callable[[], object], steps: int) -> float:
    return statistics.mean(training.step_s(training.model, step) for _ in range(steps))


def _beside(took_s: list[float], bare_s: list[float], traffic: tuple[Traffic, ...]) -> Measured:
    engine_s = statistics.median(took_s) - statistics.median(bare_s)
    return Measured(engine_s, tuple(bare_s), traffic)


@contextmanager
def some_process_group() -> Iterator[None]:
    """Have a default process group, of this process alone where there is none."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()

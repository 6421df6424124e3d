"""What to exchange gradients with, here: measured, predicted, recommended."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from topq_dist.advice.engine import (
    Measured,
    Training,
    bare_steps_s,
    some_process_group,
    step_with,
)
from topq_dist.advice.link_times import measure_link, slowest
from topq_dist.advice.report import Advice
from topq_dist.advice.time_model import (
    GivenLink,
    MeasuredLink,
    Method,
    MethodCost,
    Traffic,
    predict,
    recommend,
)
from topq_dist.compress.codec.values import check_value_format
from topq_dist.compress.defaults import DEFAULT_Q, DEFAULT_VALUE_FORMAT
from topq_dist.exchange.agreement import check_same_on_all_ranks
from topq_dist.exchange.collectives import CommContext
from topq_dist.exchange.shards import telling_of_failures
from topq_dist.local.settings import check_whole
from topq_dist.module_names import check_not_fsdp1, unwrapped
from topq_dist.telemetry.stats import Meter
from topq_dist.validation import check_fraction, check_number

DEFAULT_QS = (DEFAULT_Q, 0.99, 0.999)
DEFAULT_VALUE_FORMATS = (DEFAULT_VALUE_FORMAT, "int4", "fp16")
_POWER_RANKS = (1, 4)
_FEWEST_STEPS, _MOST_STEPS = 3, 10


def advise(
    model: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    optimizer: Optimizer,
    *,
    qs: Sequence[float] = DEFAULT_QS,
    value_formats: Sequence[str] = DEFAULT_VALUE_FORMATS,
    every: int = 5,
    bandwidth_bits_per_s: float | None = None,
    latency_s: float | None = None,
    world_size: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    compute_s: float | None = None,
    budget_s: float = 60.0,
    progress: Callable[[str], object] = lambda _: None,
) -> Advice:
    """Predict a training step under dense, fp16, PowerSGD, top-Q and local steps; recommend one.

    model: bare, on its device, in the mode it trains in; each method wraps it itself, as it is
        used. Parameters, buffers, the optimizer's state and torch's random numbers are put back
        afterwards.
    loss: returns the loss of the model it is given on the next batch. Its gradients are those that
        are compressed.
    optimizer: of this model.
    qs, value_formats: of top-Q; each q with each format. every: of local steps.
    bandwidth_bits_per_s, latency_s, world_size: of a link between hosts that are not there, by
        default without latency and of two; this process is then alone, and nothing is a collective.
        None measures the link of the process group.
    process_group: the ranks that train; None is the default group. Then this is a collective, and
        all ranks return the same.
    compute_s: seconds of a step that exchanges nothing, where they are known better than by `loss`;
        None takes those measured.
    budget_s: about how long methods are measured, in which each has three steps at least, and ten
        at most, in turn with as many that exchange nothing.
    progress: called with a line for each method.

    Raises TypeError or ValueError for a value out of place, naming it; RuntimeError with neither a
    process group nor a bandwidth; ExchangeError on every rank where ranks disagree on settings or
    model, or the first step fails on one.
    """
    methods = _methods(qs, value_formats, every)
    if compute_s is not None and check_number("compute_s", compute_s) < 0:
        raise ValueError(f"compute_s={compute_s!r}: expected a number from 0, or None")
    if check_number("budget_s", budget_s) <= 0:
        raise ValueError(f"budget_s={budget_s!r}: expected a number above zero")
    training = Training(model=_checked_model(model), loss=loss, optimizer=optimizer)
    given = {"latency_s": latency_s, "world_size": world_size}
    where: GivenLink | _Ranks
    if bandwidth_bits_per_s is None:
        _check_unset(given, "without bandwidth_bits_per_s: expected None, since it is measured")
        where = _Ranks(_group(process_group), training)
    else:
        _check_unset(
            {"process_group": process_group},
            f"with bandwidth_bits_per_s={bandwidth_bits_per_s!r}: expected None, since it is given",
        )
        where = GivenLink(
            bandwidth_bits_per_s=bandwidth_bits_per_s,
            latency_s=latency_s or 0.0,
            world_size=2 if world_size is None else world_size,
        )
    size = where.world_size
    if size > 2:
        methods += [replace(one, exchange="split") for one in methods if one.exchange]
    with some_process_group():
        progress("a step that exchanges nothing")
        if isinstance(where, GivenLink):
            first_s = bare_steps_s(training, 1)[0]
        else:
            first_s = where.first_step_s(f"{methods}\n{compute_s}\n{budget_s}")
        pairs = int(budget_s / len(methods) / (2 * first_s))
        steps = max(_FEWEST_STEPS, min(_MOST_STEPS, pairs))
        found: list[Measured] = []
        for method in methods:
            progress(method.title)
            if isinstance(where, _Ranks):
                where.meet()
            found.append(step_with(training, method, world_size=size, steps=steps))
        own_s = statistics.median(one_s for each in found for one_s in each.bare_s)
    if isinstance(where, _Ranks):
        own_s, found = where.agreed(own_s, found)
    costs = [
        MethodCost(method=method, engine_s=max(0.0, one.engine_s), traffic=one.traffic)
        for method, one in zip(methods, found, strict=True)
    ]
    compute_s = own_s if compute_s is None else compute_s
    link: GivenLink | MeasuredLink
    if isinstance(where, _Ranks):
        progress("the link")
        link = where.link(_largest(costs), compute_s)
    else:
        link = where
    predictions = predict(costs, link, compute_s=compute_s, world_size=size)
    return Advice(
        parameters=sum(one.numel() for one in model.parameters() if one.requires_grad),
        world_size=size,
        link=link,
        predictions=tuple(predictions),
        recommendation=recommend(predictions),
    )


def _methods(qs: Sequence[float], value_formats: Sequence[str], every: int) -> list[Method]:
    """Return the methods of two ranks, dense first; raises for what is out of place."""
    if not qs or not value_formats:
        raise ValueError(f"qs={qs!r}, value_formats={value_formats!r}: expected one at least")
    if check_whole("every", every) < 2:
        raise ValueError(f"every={every}: expected a number of steps above one")
    topq = [
        Method(
            kind="top-Q",
            q=check_fraction("qs", q),
            value_format=check_value_format(value_format),
            exchange="allgather",
        )
        for q in dict.fromkeys(qs)
        for value_format in dict.fromkeys(value_formats)
    ]
    power = [Method(kind="PowerSGD", power_rank=rank) for rank in _POWER_RANKS]
    local = Method(kind="local steps", q=DEFAULT_Q, value_format=DEFAULT_VALUE_FORMAT, every=every)
    return [Method(kind="dense"), Method(kind="fp16"), *power, *topq, local]


def _check_unset(options: Mapping[str, object], why: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}={value!r} {why}")


def _group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Return the group whose link is to be measured."""
    found = group or (dist.group.WORLD if dist.is_initialized() else None)
    if found is None:
        raise RuntimeError(
            "no process group to measure a link of: expected init_process_group, as under "
            "torchrun, or bandwidth_bits_per_s"
        )
    if found.size() < 2:
        raise ValueError(f"process_group has {found.size()} rank: expected two at least")
    return found


def _checked_model(model: nn.Module) -> nn.Module:
    """Return the model, or raise TypeError or ValueError where no method can wrap it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: expected a torch.nn.Module")
    check_not_fsdp1(model)
    if isinstance(unwrapped(model), DistributedDataParallel):
        raise ValueError("model is wrapped: expected it bare, since each method wraps it itself")
    trainable = [one for one in model.parameters() if one.requires_grad]
    if not trainable:
        raise ValueError("model has no trainable parameter: expected one at least")
    if any(isinstance(one, DTensor) for one in trainable):
        raise ValueError("model is sharded: expected one that DistributedDataParallel can wrap")
    return model


def _largest(costs: Sequence[MethodCost]) -> dict[str, int]:
    """Return for each collective the most bytes that a step hands over."""
    largest: dict[str, int] = {}
    for traffic in (one for cost in costs for one in cost.traffic):
        before = largest.get(traffic.collective, 0)
        largest[traffic.collective] = max(before, traffic.handed_bytes)
    return largest


class _Ranks:
    """The ranks that are advised together."""

    def __init__(self, group: dist.ProcessGroup, training: Training) -> None:
        self._context = CommContext(group=group, device=training.device, meter=Meter())
        self._training = training

    @property
    def world_size(self) -> int:
        return self._context.size

    def first_step_s(self, settings: str) -> float:
        """Return the slowest rank's first step, where all ranks have settings and model alike."""
        with telling_of_failures(self._context):
            took_s = bare_steps_s(self._training, 1)[0]
        names = (
            f"{name} {tuple(one.shape)} {one.dtype} {one.requires_grad}"
            for name, one in self._training.model.named_parameters()
        )
        self._check("\n".join([settings, *names]))
        return self._slowest([took_s])[0]

    def meet(self) -> None:
        """Wait for all ranks, which then measure beside each other as they train."""
        dist.barrier(group=self._context.group)

    def agreed(self, own_s: float, found: Sequence[Measured]) -> tuple[float, list[Measured]]:
        """Return the slowest rank's times and the most that one hands over."""
        self._check(repr([[one.collective for one in each.traffic] for each in found]))
        numbers = [own_s, *(each.engine_s for each in found)]
        for one in (one for each in found for one in each.traffic):
            numbers += [one.calls, one.handed_bytes]
        agreed = iter(self._slowest(numbers))
        own_s = next(agreed)
        engines_s = [next(agreed) for _ in found]
        return own_s, [
            Measured(
                engine_s,
                each.bare_s,
                tuple(
                    Traffic(one.collective, int(next(agreed)), int(next(agreed)))
                    for one in each.traffic
                ),
            )
            for engine_s, each in zip(engines_s, found, strict=True)
        ]

    def link(self, largest_bytes: Mapping[str, int], pause_s: float) -> MeasuredLink:
        """Return how long collectives take, up to these bytes."""
        group, device = self._context.group, self._context.device
        return measure_link(largest_bytes, group=group, device=device, pause_s=pause_s)

    def _check(self, text: str) -> None:
        check_same_on_all_ranks(text, group=self._context.group, device=self._context.device)

    def _slowest(self, numbers: Sequence[float]) -> list[float]:
        return slowest(numbers, group=self._context.group, device=self._context.device)

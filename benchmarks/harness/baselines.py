"""The hooks that a DDP step is measured under: torch's own, the plain top-k one, and ours.

The plain hook is the one found in most training scripts: torch.topk over the bucket, int64
indices and fp32 values through two all-gathers, what was not sent kept for the next step.
"""

# no annotations from the future: DDP looks at those of a hook, and takes no text for a type
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import topq_dist

if TYPE_CHECKING:
    from topq_dist.exchange.registry import ExchangeName

DENSITY = 0.01
# the first step makes the buckets, PowerSGD refuses to start before its second
POWERSGD_START_STEP = 2
ONE_BUCKET_MB = 1024


@dataclass(frozen=True, kw_only=True)
class Hook:
    """One row of the table: how it is registered, and what it needs to run at all."""

    title: str
    register: Callable[[DistributedDataParallel], "topq_dist.TopQState | None"]
    bucket_cap_mb: int | None = None
    warmup_steps: int = 2
    # whether warm-up must go on until the hook has made up its mind
    chooses: bool = False
    note: str = ""


@dataclass(kw_only=True)
class PlainTopKState:
    """Residuals by bucket index, reset where DDP's rebuild changes a bucket's size."""

    density: float
    residuals: dict[int, torch.Tensor] = field(default_factory=dict)


def plain_topk_hook(
    state: PlainTopKState,
    bucket: dist.GradBucket,
) -> torch.futures.Future[torch.Tensor]:
    """Average the top `density` of each rank's bucket by magnitude, with error feedback."""
    gradient = bucket.buffer()
    residual = state.residuals.get(bucket.index())
    if residual is not None and residual.numel() == gradient.numel():
        gradient.add_(residual)
    k = max(1, int(gradient.numel() * state.density))
    _, indices = torch.topk(gradient.abs(), k, sorted=False)
    values = gradient[indices]
    residual = gradient.clone()
    residual[indices] = 0.0
    state.residuals[bucket.index()] = residual

    world_size = dist.get_world_size()
    all_indices = [torch.empty_like(indices) for _ in range(world_size)]
    all_values = [torch.empty_like(values) for _ in range(world_size)]
    gathers = [
        dist.all_gather(all_indices, indices, async_op=True).get_future(),
        dist.all_gather(all_values, values, async_op=True).get_future(),
    ]

    def average(done: torch.futures.Future[list[torch.futures.Future[None]]]) -> torch.Tensor:
        for gather in done.value():
            gather.value()
        gradient.zero_()
        for from_indices, from_values in zip(all_indices, all_values, strict=True):
            gradient.index_add_(0, from_indices, from_values)
        averaged: torch.Tensor = gradient.div_(world_size)
        return averaged

    return torch.futures.collect_all(gathers).then(average)


def _register_nothing(model: DistributedDataParallel) -> None:
    return None


def _register_fp16(model: DistributedDataParallel) -> None:
    model.register_comm_hook(dist.group.WORLD, default_hooks.fp16_compress_hook)


def _register_powersgd(model: DistributedDataParallel, *, rank: int) -> None:
    state = powerSGD_hook.PowerSGDState(
        process_group=None,
        matrix_approximation_rank=rank,
        start_powerSGD_iter=POWERSGD_START_STEP,
    )
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def _register_plain_topk(model: DistributedDataParallel) -> None:
    model.register_comm_hook(PlainTopKState(density=DENSITY), plain_topk_hook)


def _register_topq(
    model: DistributedDataParallel, *, exchange: "ExchangeName"
) -> "topq_dist.TopQState":
    # not imported above, or what it loads would count as memory of the others
    return topq_dist.register_topq_hook(
        model, q=1.0 - DENSITY, value_format="fp16", exchange=exchange
    )


def _register_topq_defaults(model: DistributedDataParallel) -> "topq_dist.TopQState":
    return topq_dist.register_topq_hook(model)


def _powersgd(rank: int) -> Hook:
    return Hook(
        title=f"PowerSGD rank {rank}",
        register=functools.partial(_register_powersgd, rank=rank),
        bucket_cap_mb=ONE_BUCKET_MB,
        warmup_steps=POWERSGD_START_STEP + 3,
        note="in one bucket: on gloo it aborts when several buckets are in flight",
    )


def _topq(exchange: "ExchangeName") -> Hook:
    return Hook(
        title=f"topq_dist, {exchange}",
        register=functools.partial(_register_topq, exchange=exchange),
        warmup_steps=6,
        chooses=exchange == "auto",
        note=f"q = {1.0 - DENSITY:.2f}, fp16 values" if exchange == "auto" else "",
    )


HOOKS: dict[str, Hook] = {
    "dense": Hook(title="dense", register=_register_nothing),
    "fp16": Hook(title="fp16_compress_hook", register=_register_fp16),
    "powersgd1": _powersgd(1),
    "powersgd4": _powersgd(4),
    "topk": Hook(
        title="torch.topk + all_gather, 1 %", register=_register_plain_topk, warmup_steps=3
    ),
    "topq": _topq("auto"),
    "topq_defaults": Hook(
        title="topq_dist, its defaults",
        register=_register_topq_defaults,
        warmup_steps=6,
        chooses=True,
        note="q = 0.97, two-bit values, bounded",
    ),
    "topq_allgather": _topq("allgather"),
    "topq_split": _topq("split"),
    "topq_dense": _topq("dense"),
}
# the single exchanges are there to explain what "auto" chose
DEFAULT_HOOKS = ("dense", "fp16", "powersgd1", "powersgd4", "topk", "topq", "topq_defaults")

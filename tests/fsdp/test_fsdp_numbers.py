"""The hook under fully_shard has the bits of native HSDP, and of a reference in one process."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp_cases import adamw, equal, hooked, mesh_of, plain, replicas_are_equal, train
from hook_cases import keep_top, loss_of
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from topq_dist.fsdp.torch_side import sharded_modules
from topq_dist.optim.momentum_rules import MomentumSwitch
from topq_dist.sparsity import k_from_q
from topq_dist.telemetry.catalog import STEPS

pytestmark = pytest.mark.gloo
POLICIES = {
    "fp32": MixedPrecisionPolicy(),
    "bf16, reduced in fp32": MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32
    ),
    "bf16": MixedPrecisionPolicy(param_dtype=torch.bfloat16),
    "reduced in fp16": MixedPrecisionPolicy(reduce_dtype=torch.float16),
    "reduced in fp64": MixedPrecisionPolicy(reduce_dtype=torch.float64),
}


def against_native(_: int, replicas: int, shards: int) -> dict[str, bool]:
    """Return of each way to train whether parameters ended in the same bits, and stats of one."""
    mesh = mesh_of(replicas, shards)
    found = {}
    for name, policy in POLICIES.items():
        ways = ((1, False), (3, True)) if replicas * shards == 4 else ((3, True),)
        for accumulates, clips in ways:
            native = plain(mesh, mp_policy=policy)
            train(native, adamw(native), range(3), accumulates=accumulates, clips=clips)
            model = plain(mesh["shard"], mp_policy=policy)
            optimizer = adamw(model)
            state = hooked(model, mesh, optimizer, q=0)
            train(model, optimizer, range(3), accumulates=accumulates, clips=clips)
            found[f"{name}, {accumulates}"] = equal(native, model)
            assert state.stats().steps == 3
            # three dense vectors of each of three steps and what says that ranks agree
            assert state.stats().dense_bytes < state.stats().sent_bytes
    state.q = 0.9
    for q in (0.9, 0.0):
        # there and back, with a residual that is flushed
        state.q = q
        train(model, optimizer, range(3))
    assert replicas_are_equal(model, mesh)
    assert state.stats().steps == 9
    return found


@pytest.mark.parametrize(("replicas", "shards"), [(2, 2), (2, 3), (3, 2)])
def test_q_of_zero_has_the_bits_of_native_hsdp(replicas: int, shards: int, tmp_path: Path) -> None:
    for found in run_ranks(replicas * shards, against_native, tmp_path, replicas, shards):
        assert len(found) >= len(POLICIES)
        assert all(found.values()), found


class ShardReference:
    """2 x 2 ranks in one process: each replica's mean, of it each shard's top-Q part."""

    def __init__(self, q: float) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(13, 10), nn.Tanh(), nn.Linear(10, 7), nn.Tanh())
        self.model.append(nn.Linear(7, 5))
        self.q = q
        self.residuals: dict[tuple[int, str], list[Tensor]] = defaultdict(list)

    def backward(self, step: int) -> None:
        averages: dict[str, Tensor] = {}
        for replica in range(2):
            means: dict[str, Tensor] = {}
            for rank in (2 * replica, 2 * replica + 1):
                self.model.zero_grad()
                loss_of(self.model, step, rank).backward()  # type: ignore[no-untyped-call]
                for name, parameter in self.model.named_parameters():
                    assert parameter.grad is not None
                    means[name] = means[name] + parameter.grad if name in means else parameter.grad
            for name, total in means.items():
                sent = self._sent(replica, name, total / 2) / 2
                averages[name] = averages[name] + sent if replica else sent
        for name, parameter in self.model.named_parameters():
            parameter.grad = averages[name]

    def _sent(self, replica: int, name: str, gradient: Tensor) -> Tensor:
        held = self.residuals[replica, name]
        shards = [shard.reshape(1, -1) for shard in gradient.chunk(2)]
        if held:
            shards = [shard + left for shard, left in zip(shards, held, strict=True)]
        ks = [max(1, k_from_q(self.q, shard.numel())) for shard in shards]
        sent = [keep_top(shard, k) for shard, k in zip(shards, ks, strict=True)]
        held[:] = [shard - one for shard, one in zip(shards, sent, strict=True)]
        return torch.cat([one.flatten() for one in sent]).view_as(gradient)


def against_reference(rank: int, *, divides_itself: bool = False) -> float:
    mesh = mesh_of(2, 2)
    model = plain(mesh["shard"])
    if divides_itself:
        for module in sharded_modules(model):
            module.set_gradient_divide_factor(4.0)
            module.set_force_sum_reduction_for_comms(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = hooked(
        model, mesh, optimizer, q=0.8, value_format=None, bound=None, exchange="allgather"
    )
    reference = ShardReference(0.8)
    sgd = torch.optim.SGD(reference.model.parameters(), lr=0.1)
    for step in range(5):
        train(model, optimizer, [step])
        reference.backward(step)
        sgd.step()
        pairs = zip(model.parameters(), reference.model.parameters(), strict=True)
        for mine, theirs in pairs:
            assert torch.equal(mine.full_tensor(), theirs)
    residuals = state.state_dict()[f"replica{rank // 2}"]["residuals"]
    for name, residual in residuals.items():
        # by parameter name and shard
        mine = residual.to_local().flatten()
        assert torch.equal(mine, reference.residuals[rank // 2, name][rank % 2].flatten())
    assert mesh["shard"].get_local_rank() == rank % 2
    return float(state.stats().ratio)


def defaults(rank: int) -> list[float]:
    """Return the factor of each step's rate under the defaults, the same on all ranks."""
    mesh = mesh_of(2, 2)
    model = plain(mesh["shard"])
    optimizer = adamw(model)
    state = hooked(model, mesh, optimizer, exchange="allgather", q=0.95)
    factors = []
    seen: list[tuple[float, float]] = []

    def look(_: Any, args: tuple[Any, ...], __: Any) -> None:
        seen.append(args[0].param_groups[0]["betas"])

    optimizer.register_step_pre_hook(look)
    for _ in range(12):
        # one batch a rank over and over, so that gradients agree
        train(model, optimizer, [0])
        switch = state._parts.stages.momentum._switch  # type: ignore[attr-defined]
        assert isinstance(switch, MomentumSwitch)
        factors.append(switch.rate_factor)
    # behind error feedback there is no momentum, and the groups hold the user's
    assert state._parts.method == "feedback"
    assert seen == [(0.0, 0.999)] * 12
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert replicas_are_equal(model, mesh)
    assert state.stats().ratio > 1.0
    state.observe()
    train(model, optimizer, [0])
    readings = {one.metric: one.value for one in state.readings()}
    assert readings[STEPS] == 13
    state.detach()
    train(model, optimizer, range(2))
    assert replicas_are_equal(model, mesh)
    return factors


def numbers(rank: int) -> tuple[float, list[float]]:
    against_reference(rank, divides_itself=True)
    return against_reference(rank), defaults(rank)


def test_sparse_steps_equal_a_reference_and_the_rate_is_raised_alike(tmp_path: Path) -> None:
    results = run_ranks(4, numbers, tmp_path)
    assert all(factors == results[0][1] for _, factors in results)
    assert max(results[0][1]) > 1.0
    assert results[0][1][0] == 1.0
    assert dist.is_available()

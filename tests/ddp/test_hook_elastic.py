"""The hook in an elastic run: the numbers of one that is not, and a rank that is killed."""

from __future__ import annotations

import datetime as dt
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import FORKED
from hook_cases import loss_of, small_model
from ranks import run_ranks
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from topq_dist import (
    Elastic,
    TopQGradientOptimizer,
    TopQState,
    register_topq_hook,
)
from topq_dist.elastic.store import serve
from topq_dist.optim import GradientTransformerOptimizer

pytestmark = [pytest.mark.gloo, pytest.mark.usefixtures("one_thread")]
OPTIONS: dict[str, Any] = {"q": 0.8, "exchange": "allgather"}
KNOBS: dict[str, dict[str, Any]] = {
    "adam": {"clip_norm": 0.5},
    "sgd": {"momentum": "optimizer", "value_format": "fp32", "bound": None},
}
STEPS, DIES_AT = 40, 9


def optimizer_of(kind: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    if kind == "adam":
        return torch.optim.AdamW(model.parameters(), lr=1e-2)
    return torch.optim.SGD(model.parameters(), lr=0.05)


def trained(ddp: Any, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    optimizer.zero_grad()
    loss_of(ddp, step, rank).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def numbers(ddp: DistributedDataParallel) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in ddp.module.parameters()]


def both_ways(rank: int, port: int) -> list[bool]:
    same = []
    group = dist.new_group([rank], use_local_synchronization=True)
    for kind, knobs in KNOBS.items():
        ends = []
        for elastic in (False, True):
            # one vector in both: buckets of their own would be rounded apart
            model = small_model(seed=rank if elastic else 0)
            ddp = DistributedDataParallel(model, process_group=group if elastic else None)
            optimizer = optimizer_of(kind, model)
            place = Elastic(store=f"127.0.0.1:{port}", name=str(rank), ranks=2, run=kind)
            state = register_topq_hook(
                ddp, optimizer, elastic=place if elastic else False, **OPTIONS, **knobs
            )
            for step in range(6):
                trained(ddp, optimizer, rank, step)
            state.close()
            ends.append(numbers(ddp))
        same.append(all(torch.equal(*pair) for pair in zip(*ends, strict=True)))
    return same


def test_an_elastic_run_that_loses_nobody_ends_in_the_same_bits(tmp_path: Path) -> None:
    store = serve("127.0.0.1:0")
    assert run_ranks(2, both_ways, tmp_path, store.port) == [[True, True]] * 2


class WithBuffer(torch.nn.Module):
    """A model with a buffer that no state_dict has, and that has grown by now."""

    known: torch.Tensor

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.inner = small_model(seed=rank)
        self.register_buffer("known", torch.full((3,), float(rank)), persistent=False)

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.inner(inputs)


def with_buffers(rank: int, port: int) -> list[float]:
    group = dist.new_group([rank], use_local_synchronization=True)
    model = WithBuffer(rank)
    ddp = DistributedDataParallel(model, process_group=group)
    place = Elastic(store=f"127.0.0.1:{port}", name=str(rank), ranks=2)
    optimizer = optimizer_of("sgd", model)
    state = register_topq_hook(ddp, optimizer, elastic=place, **OPTIONS)
    hook = state._elastic_hook()
    known: list[float] = model.known.tolist()
    # as a peer would hand it that has run for longer
    theirs = hook.state_for_peer()
    theirs["tensors"] |= {"known": torch.full((5,), 7.0)}
    hook.take_state(theirs)
    known += model.known.tolist()
    state.close()
    return known


def test_buffers_that_no_state_dict_has_are_handed_over(tmp_path: Path) -> None:
    store = serve("127.0.0.1:0")
    first, second = run_ranks(2, with_buffers, tmp_path, store.port)
    assert first == second
    assert first[3:] == [7.0] * 5


class WithExtraState(torch.nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 1}


def rank_main(folder: Path, place: Elastic, dies_at: int, options: dict[str, Any]) -> None:
    """Train among ranks of which one dies in its backward pass, and keep what each step ends in."""
    torch.set_num_threads(1)
    rank = int(place.name)
    alone = dt.timedelta(seconds=60)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=alone)
    model = small_model(seed=rank)
    ddp = DistributedDataParallel(model)
    optimizer = optimizer_of("adam", model)
    state = register_topq_hook(ddp, optimizer, elastic=place, **options)
    ends: dict[int, list[torch.Tensor]] = {}
    while state.steps_taken < STEPS:
        if state.steps_taken == dies_at:
            # in its backward pass, some of which the others may have
            next(model.parameters()).register_hook(lambda _: os._exit(9))  # type: ignore[no-untyped-call]
        if dies_at < 0 and place.name == "0" and state.steps_taken == STEPS // 2:
            wait_for(state)
        trained(ddp, optimizer, rank, state.steps_taken)
        ends[state.steps_taken] = numbers(ddp)
    lost = [one.member for one in state.lost_residuals]
    torch.save({"ends": ends, "lost": lost}, folder / f"{place.name}.{dies_at}.pt")
    state.close()
    os._exit(0)


def wait_for(state: TopQState) -> None:
    """Let a rank come in before this one ends, while it gives signs of life."""
    membership = state._elastic_hook().epochs.membership
    ends_s = time.monotonic() + 60
    while len(state.members) < 3 and not membership.somebody_waits and time.monotonic() < ends_s:
        time.sleep(0.02)


def test_a_killed_rank_voids_its_step_and_comes_back_to_what_the_others_have(
    tmp_path: Path,
) -> None:
    store = serve("127.0.0.1:0")

    def started(name: str, dies_at: int = -1) -> Any:
        address = f"127.0.0.1:{store.port}"
        place = Elastic(store=address, name=name, ranks=3, lease_s=3.0)
        process = FORKED.Process(target=rank_main, args=(tmp_path, place, dies_at, OPTIONS))
        process.start()
        return process

    ranks = [started("0"), started("1"), started("2", DIES_AT)]
    ranks[2].join(60)
    assert ranks[2].exitcode == 9
    ranks.append(started("2"))
    for rank in (ranks[0], ranks[1], ranks[3]):
        rank.join(90)
        assert rank.exitcode == 0
    found = [torch.load(tmp_path / f"{name}.-1.pt", weights_only=True) for name in ("0", "1", "2")]
    assert sorted(found[0]["ends"]) == list(range(1, STEPS + 1))
    assert min(found[2]["ends"]) > DIES_AT
    for result in found:
        assert result["lost"] == ["2"]
        for step, parameters in result["ends"].items():
            for mine, theirs in zip(parameters, found[0]["ends"][step], strict=True):
                assert torch.equal(mine, theirs), step


def test_what_cannot_be_elastic_is_refused(alone: dist.ProcessGroup) -> None:
    store = serve("127.0.0.1:0")
    place = Elastic(store=f"127.0.0.1:{store.port}", name="0", ranks=1)
    model = small_model()
    ddp = DistributedDataParallel(model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    paired = TopQGradientOptimizer(None, own, q=0.5, param_ndim=None)
    within = GradientTransformerOptimizer(None, paired, param_ndim=None)
    good: dict[str, Any] = {**OPTIONS, "elastic": place}
    for words, optimizer, options in (
        ("exchange='auto'", sgd, {"exchange": "auto"}),
        ("momentum='corrected'", sgd, {"momentum": "corrected"}),
        ("scope='bucket'", sgd, {"scope": "bucket"}),
        ("optimizer is a NoneType", None, {}),
        ("optimizer is or has a TopQGradientOptimizer", within, {"q": None}),
    ):
        with pytest.raises(ValueError, match=words):
            register_topq_hook(ddp, optimizer, **(good | options))
    modes: tuple[dict[str, Any], ...] = ({"find_unused_parameters": True}, {"static_graph": True})
    for unfit in modes:
        with pytest.raises(ValueError, match="ranks would step apart"):
            register_topq_hook(DistributedDataParallel(model, **unfit), sgd, **good)
    extra = DistributedDataParallel(torch.nn.Sequential(WithExtraState(4, 4)))
    with pytest.raises(ValueError, match=r"get_extra_state\(\) of 0, which cannot be handed"):
        register_topq_hook(extra, torch.optim.SGD(extra.parameters(), lr=0.1), **good)
    with pytest.raises(ValueError, match="wrapped later"):
        TopQState(model, sgd, **good)
    half = DistributedDataParallel(small_model(dtype=torch.float16))
    plain = torch.optim.SGD(half.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="grad_scaler with elastic and parameters of float16"):
        register_topq_hook(half, plain, grad_scaler=GradScaler("cpu"), **good)
    state = register_topq_hook(ddp, sgd, **good)
    trained(ddp, sgd, 0, 0)
    assert (state.steps_taken, state.members) == (1, ("0",))
    with pytest.raises(ValueError, match="all_ranks=True"):
        state.state_dict(all_ranks=True)
    assert state.state_dict()["lost_residuals"] == []
    state.close()
    with pytest.raises(RuntimeError, match="has left the run"):
        trained(ddp, sgd, 0, 1)

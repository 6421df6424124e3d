"""States made before DistributedDataParallel, and states of all ranks that one rank writes."""

from __future__ import annotations

import copy
import functools
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hook_cases import loss_of, small_model
from ranks import error_of, run_ranks
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.nn.parallel import DistributedDataParallel

from topq_dist import TopQGradientOptimizer, TopQState, register_topq_hook, topq_hook

pytestmark = pytest.mark.gloo
OPTIONS: dict[str, Any] = {"q": 0.9, "exchange": "allgather", "momentum": "optimizer"}


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int) -> None:
    optimizer.zero_grad()
    loss_of(model, step, rank).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


class Trainer:
    """As a trainer has it: the state and the hook first, then the model, wrapped and wrapped."""

    def __init__(self, state: TopQState, hook: Any) -> None:
        self.state, self.hook = state, hook

    def wrap(self, module: nn.Module) -> DistributedDataParallel:
        model = DistributedDataParallel(nn.Sequential(module), bucket_cap_mb=0.005)
        model.register_comm_hook(state=self.state, hook=self.hook)
        return model


def before_ddp(rank: int) -> dict[str, Any]:
    said: dict[str, Any] = {}
    wrapped = DistributedDataParallel(small_model(), bucket_cap_mb=0.005)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    reference = register_topq_hook(wrapped, **OPTIONS)
    module = small_model()
    state = TopQState(module, **OPTIONS)
    said["early"] = error_of(state.state_dict)
    assert state.chosen_exchange is None
    assert state.stats().steps == 0
    assert state.q == 0.9
    model = Trainer(state, topq_hook).wrap(module)
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        step_of(wrapped, optimizer, step, rank)
        step_of(model, other, step, rank)
        assert same(wrapped, model), step
    saved, expected = state.state_dict(), reference.state_dict()
    for name, one in expected["residuals"].items():
        assert torch.equal(one, saved["residuals"][name])
    # a state that is loaded before the first pass is taken up in it
    again = small_model()
    again.load_state_dict(module.state_dict())
    late = TopQState(again, **OPTIONS)
    late.load_state_dict(saved)
    resumed = Trainer(late, topq_hook).wrap(again)
    third = torch.optim.SGD(resumed.parameters(), lr=0.1)
    for step in range(4, 6):
        step_of(model, other, step, rank)
        step_of(resumed, third, step, rank)
        assert same(model, resumed)
    # by the composable way, which wraps when the model is first called
    composable = small_model()
    named = TopQState(composable, **OPTIONS)
    replicated: Any = replicate(composable)
    replicated.register_comm_hook(named, topq_hook)
    fourth = torch.optim.SGD(composable.parameters(), lr=0.1)
    for step in range(2):
        step_of(replicated, fourth, step, rank)
    assert named.stats().steps == 2
    assert set(named.state_dict()["residuals"]) == set(saved["residuals"])
    return said


def optimizer_later(rank: int) -> dict[str, Any]:
    """The optimizer of a trainer, made after the state and before the first pass."""
    said: dict[str, Any] = {}
    ends = []
    for late in (False, True):
        module = small_model()
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
        if late:
            state = TopQState(module, q=0.9, exchange="allgather")
            assert state.optimizer is None
            state.optimizer = optimizer
            copied = copy.deepcopy(state)
            assert copied.optimizer is not optimizer
            model = Trainer(state, topq_hook).wrap(module)
        else:
            model = DistributedDataParallel(nn.Sequential(module), bucket_cap_mb=0.005)
            state = register_topq_hook(model, optimizer, q=0.9, exchange="allgather")
        for step in range(4):
            step_of(model, optimizer, step, rank)
        assert state.state_dict()["momentum"]["method"] == "feedback"
        ends.append(model)
        set_it = functools.partial(setattr, state, "optimizer", optimizer)
        said[f"set too late, {late}"] = error_of(set_it)
    assert same(*ends)
    module = small_model()
    paired = TopQGradientOptimizer(module.parameters(), q=0.5, param_ndim=None, lr=0.1)
    state = TopQState(module, exchange="allgather")
    state.optimizer = paired
    step_of(Trainer(state, topq_hook).wrap(module), paired, 0, rank)
    return said


def disagreeing(rank: int) -> dict[str, str]:
    said = {}
    module = small_model()
    late = TopQState(module, exchange="allgather", q=0.9 if rank else 0.8)
    model = Trainer(late, topq_hook).wrap(module)
    said["q"] = error_of(lambda: loss_of(model, 0, rank).backward())  # type: ignore[no-untyped-call]
    module = small_model()
    late = TopQState(module, **OPTIONS)
    if rank:
        late.load_state_dict({"version": 1})
    model = Trainer(late, topq_hook).wrap(module)
    said["rubbish"] = error_of(lambda: loss_of(model, 0, rank).backward())  # type: ignore[no-untyped-call]
    stranger = TopQState(small_model(), **OPTIONS)
    other = Trainer(stranger, topq_hook).wrap(small_model())
    said["stranger"] = error_of(lambda: loss_of(other, 0, rank).backward())  # type: ignore[no-untyped-call]
    said["bucket"] = error_of(lambda: TopQState(small_model(), scope="bucket"))
    said["q=7"] = error_of(lambda: TopQState(small_model(), q=7.0))
    return said


def late(rank: int) -> dict[str, Any]:
    return before_ddp(rank) | optimizer_later(rank) | disagreeing(rank)


def test_a_state_made_first_binds_in_the_first_backward_pass(tmp_path: Path) -> None:
    for rank, said in enumerate(run_ranks(2, late, tmp_path)):
        assert said["early"].startswith("RuntimeError: this state has no ranks yet")
        for flag in (False, True):
            assert "optimizer is set too late" in said[f"set too late, {flag}"]
        assert "q=0.8" in said["q"]
        assert "q=0.9" in said["q"]
        assert "state has world_size=None" in said["rubbish"]
        assert ("ValueError" if rank else "ExchangeError") in said["rubbish"]
        assert "which the hook's model has not" in said["stranger"]
        assert "scope='bucket' for a model that is wrapped later" in said["bucket"]
        assert "q=7.0" in said["q=7"]


METHODS: tuple[tuple[Any, Any], ...] = (
    ("feedback", lambda p: torch.optim.AdamW(p, lr=0.01)),
    ("corrected", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    ("adam", lambda p: torch.optim.Adam(p, lr=0.01)),
)


def gathered(rank: int, folder: Path) -> dict[str, Any]:
    """Return a rank's own states, once rank 0 has written those of all; then go on from them."""
    own: dict[str, Any] = {}
    for method, make in METHODS:
        model = DistributedDataParallel(small_model(), bucket_cap_mb=0.005)
        optimizer = make(model.parameters())
        options: dict[str, Any] = {"momentum": method, "exchange": "allgather", "q": 0.9}
        state = register_topq_hook(model, optimizer, **options)
        for step in range(3):
            step_of(model, optimizer, step, rank)
        everything = state.state_dict(all_ranks=True)
        if rank == 0:
            torch.save(everything, folder / f"{method}.pt")
        else:
            assert everything == {}
        own[method] = state.state_dict()
        weights = copy.deepcopy(model.state_dict())
        inner = copy.deepcopy(optimizer.state_dict())
        dist.barrier()
        for step in range(3, 6):
            step_of(model, optimizer, step, rank)
        again = DistributedDataParallel(small_model(), bucket_cap_mb=0.005)
        other = make(again.parameters())
        resumed = register_topq_hook(again, other, **options)
        again.load_state_dict(weights)
        other.load_state_dict(inner)
        resumed.load_state_dict(torch.load(folder / f"{method}.pt", weights_only=True))
        for step in range(3, 6):
            step_of(again, other, step, rank)
        assert same(model, again), method
    foreign = {**own["feedback"], "rank": 1 - rank}
    fresh = register_topq_hook(DistributedDataParallel(small_model()), **OPTIONS)
    own["foreign"] = error_of(lambda: fresh.load_state_dict(foreign))
    own["empty"] = error_of(lambda: fresh.load_state_dict({}))
    return own


def resumed_by_others(rank: int, folder: Path) -> dict[str, Any]:
    residuals = {}
    for method, make in METHODS:
        model = DistributedDataParallel(small_model(), bucket_cap_mb=0.005)
        state = register_topq_hook(
            model, make(model.parameters()), momentum=method, exchange="allgather", q=0.9
        )
        state.load_state_dict(torch.load(folder / f"{method}.pt", weights_only=True))
        residuals[method] = state.state_dict()["residuals"]
    return residuals


def test_one_rank_writes_the_states_of_all_and_any_number_load_them(tmp_path: Path) -> None:
    own = run_ranks(2, gathered, tmp_path, tmp_path)
    for method, _ in METHODS:
        written = torch.load(tmp_path / f"{method}.pt", weights_only=True)
        assert written.keys() == {"version", "ranks"}
        for rank in range(2):
            assert_same(written["ranks"][rank], own[rank][method])
    for rank in range(2):
        assert f"state has rank={1 - rank}: expected {rank}" in own[rank]["foreign"]
        for remedy in ("save one a rank", "state_dict(all_ranks=True)", "a list of every rank's"):
            assert remedy in own[rank]["foreign"]
        assert "state has version=None" in own[rank]["empty"]
    for world_size in (1, 3):
        loaded = run_ranks(world_size, resumed_by_others, tmp_path, tmp_path)
        for method, _ in METHODS:
            for name in own[0][method]["residuals"]:
                before = sum(own[rank][method]["residuals"][name].double() for rank in range(2))
                held = [residuals[method] for residuals in loaded]
                after = sum(one[name].double() for one in held if name in one)
                torch.testing.assert_close(after, before)


def assert_same(found: Any, expected: Any) -> None:
    file = io.BytesIO()
    torch.save(found, file)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if key not in ("select_s", "wait_s"):
                assert_same(found[key], value)
    else:
        assert found == expected

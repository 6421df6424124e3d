"""States of local steps in runs with other settings, and with buffers under way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from local_cases import equal, inner_optimizer, numbers, train
from ranks import run_ranks
from torch import Tensor, nn

from topq_dist import LocalTopQ

pytestmark = [pytest.mark.gloo, pytest.mark.usefixtures("one_thread")]
STREAMED: dict[str, Any] = {"every": 6, "fragments": 3, "overlap": 4}


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def summed(**options: Any) -> tuple[nn.Module, LocalTopQ]:
    """Return a model and steps whose rounds lose nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = inner_optimizer(model)
    usual: dict[str, Any] = {"q": 0.0, "value_format": "fp32", "residual_decay": 1.0}
    return model, LocalTopQ(model, optimizer, **(usual | options))


def moved(model: nn.Module, steps: LocalTopQ, rank: int, count: int) -> None:
    for _ in range(count):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(float(rank + 1))
        steps.end_step()


def other_settings(rank: int) -> dict[str, float]:
    """Return by how much a step has moved parameters on average, all in all."""
    results = {}
    for case, options in {
        "no overlap": {"every": 6, "fragments": 3},
        "shorter": {"every": 2, "fragments": 3, "overlap": 1},
        "at every step": {"every": 1, "fragments": 3},
        "the same": STREAMED,
    }.items():
        model, steps = summed(**STREAMED)
        start = numbers(model)
        moved(model, steps, rank, 7)
        saved = steps.state_dict()
        assert saved["under_way"]
        other, resumed = summed(**options)
        resumed.load_state_dict(saved)
        moved(other, resumed, rank, 9)
        resumed.synchronize()
        results[case] = error_of_moves(start, other)
    # rounds are announced while others are in flight, of which one ends first
    model, steps = summed(
        every=4, fragments=4, overlap=3, exchange="hierarchical", ranks_per_node=1
    )
    start = numbers(model)
    moved(model, steps, rank, 16)
    steps.synchronize()
    results["three in flight"] = error_of_moves(start, model)
    return results


def error_of_moves(start: dict[str, Tensor], model: nn.Module) -> float:
    moves = torch.cat([(now - start[name]).flatten() for name, now in numbers(model).items()])
    return float((moves / 16 - 1.5).abs().max())


def test_no_inner_step_is_lost_where_a_state_meets_other_settings(tmp_path: Path) -> None:
    for result in run_ranks(2, other_settings, tmp_path):
        assert all(error < 1e-5 for error in result.values()), result


class Averaging(nn.Module):
    """A module that puts another tensor in its buffer's place at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(13, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, inputs: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + inputs.mean().detach()
        result: Tensor = self.body(inputs)
        return result


class Growing(nn.Linear):
    """A module whose buffer grows, on one rank."""

    def grow(self, rank: int) -> None:
        self.register_buffer("cache", torch.zeros(2 + rank))


def growing(rank: int) -> str:
    model = Growing(2, 1)
    model.register_buffer("cache", torch.zeros(2))
    steps = LocalTopQ(model, inner_optimizer(model), every=1, q=0.5)
    moved(model, steps, rank, 1)
    model.grow(rank)
    return error_of(lambda: moved(model, steps, rank, 1))


def test_buffers_that_are_no_longer_alike_are_an_error_on_every_rank(tmp_path: Path) -> None:
    for error in run_ranks(2, growing, tmp_path):
        assert error.startswith("ExchangeError: ranks disagree")
        assert "cache (3,)" in error


def normed() -> tuple[nn.Module, LocalTopQ]:
    torch.manual_seed(0)
    model = Averaging()
    return model, LocalTopQ(model, inner_optimizer(model), every=4, q=0.5, overlap=2)


def buffers_under_way(rank: int) -> dict[str, Any]:
    model, steps = normed()
    train(model, steps, rank, 0, 5)
    saved = steps.state_dict()
    optimizer, buffers = copy.deepcopy(steps.optimizer.state_dict()), numbers(model)
    both = [one for one in (steps.state_dict(all_ranks=True),) if one]
    train(model, steps, rank, 5, 6)
    results: dict[str, Any] = {"received": model.get_buffer("mean")}
    train(model, steps, rank, 6, 11)
    for turn in range(2):
        other, resumed = normed()
        other.load_state_dict(buffers)
        resumed.load_state_dict(saved)
        resumed.optimizer.load_state_dict(copy.deepcopy(optimizer))
        # at once, with what was under way still under way
        results["bytes"] = len(resumed.state_dict()["buffers_under_way"][0]["bytes"])
        train(other, resumed, rank, 5, 11)
        results[f"resumed {turn}"] = equal(numbers(model), numbers(other))
    if rank == 0:
        assert both[0]["ranks"][1]["buffers_under_way"][0]["received_at"] == 6
    before = {name: state.clone() for name, state in resumed.state_dict()["outer"].items()}
    for case, wrong in {
        "short": [{"received_at": 6, "bytes": torch.zeros(3, dtype=torch.uint8)}],
        "floats": [{"received_at": 6, "bytes": torch.zeros(3)}],
        "never": [{"received_at": -1, "bytes": torch.zeros(3, dtype=torch.uint8)}],
        "two": [{}, {}],
        "text": "none",
    }.items():
        broken = saved | {"buffers_under_way": wrong}
        results[case] = error_of(lambda broken=broken: resumed.load_state_dict(broken))  # type: ignore[misc]
    results["untouched"] = equal(before, resumed.state_dict()["outer"])
    # of a version that kept none
    del saved["buffers_under_way"]
    resumed.load_state_dict(saved)
    return results


def test_buffers_under_way_are_part_of_a_state(tmp_path: Path) -> None:
    ranks = run_ranks(2, buffers_under_way, tmp_path)
    assert torch.equal(ranks[0]["received"] != 0, torch.tensor([True, True]))
    for rank, result in enumerate(ranks):
        assert result["resumed 0"]
        assert result["resumed 1"]
        # running mean and variance, their count, and the module's own
        assert result["bytes"] == (0 if rank else 8 * 4 + 8 * 4 + 8 + 2 * 4)
        assert "buffers under way of 3 bytes" in result["short"]
        assert "that are no bytes" in result["floats"]
        assert "received_at=-1" in result["never"]
        for case in ("two", "text"):
            assert "expected what state_dict returned" in result[case]
        assert result["untouched"]

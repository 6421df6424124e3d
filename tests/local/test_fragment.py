"""A rank's side of local steps, without the others: residual identity, outer SGD, blending."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from topq_dist.compress.aggregate import average
from topq_dist.compress.compressor import TopKCompressor
from topq_dist.local.fragment import split_in_fragments
from topq_dist.local.outer import OuterSgd
from topq_dist.local.replica import Replica
from topq_dist.local.settings import LocalSettings, make_settings

GENERATOR = torch.Generator().manual_seed(0)


def settings(**options: Any) -> LocalSettings:
    usual: dict[str, Any] = {
        "every": 4,
        "outer_lr": 1.0,
        "outer_momentum": 0.0,
        "nesterov": False,
        "fragments": 1,
        "offsets": None,
        "overlap": 0,
        "blend": None,
        "buffers": "first",
    }
    return make_settings(**(usual | options))


def replica(
    parameters: dict[str, Tensor], value_format: str | None, q: float, decay: float, **options: Any
) -> Replica:
    compressor = TopKCompressor(
        value_format=value_format, error_feedback=True, residual_decay=decay
    )
    return Replica(parameters, settings(**options), compressor, q=q)


def moved(parameters: dict[str, Tensor]) -> None:
    """Have inner steps change parameters."""
    for parameter in parameters.values():
        noise = torch.randn(parameter.shape, generator=GENERATOR)
        parameter.add_((0.1 * noise).to(parameter.dtype))


@pytest.mark.parametrize("value_format", [None, "fp32", "fp16", "bf16", "int8", "int4", "int2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_sent_and_what_is_left_are_all_there_was(
    value_format: str | None, dtype: torch.dtype
) -> None:
    parameters = {
        "matrix": torch.randn(30, 40, generator=GENERATOR).to(dtype),
        "bias": torch.randn(7, generator=GENERATOR).to(dtype),
        "nothing": torch.zeros(0, 3, dtype=dtype),
    }
    mine = replica(parameters, value_format, 0.9, 0.95)
    before = torch.zeros(1207, dtype=mine.fragments[0].outer.dtype)
    for _ in range(12):
        moved(parameters)
        outer = mine.fragments[0].outer.clone()
        begun = mine.begin(0)
        change = torch.cat([one.flatten() for one in parameters.values()]).to(outer.dtype)
        change -= outer.to(dtype).to(outer.dtype)
        assert torch.equal(begun.vector, change)
        compressed = mine.compress(begun)
        (frame,) = compressed.frames
        sent = average([frame], out=torch.empty_like(outer))
        assert 120 <= int((sent != 0).sum()) <= 122
        mine.compressor.residuals.apply(compressed.update)
        residuals = mine.compressor.residuals.state_dict()
        after = torch.cat([one.flatten() for one in residuals.values()])
        assert torch.equal(sent.double() + after.double(), (0.95 * before + change).double())
        before = after
        begun.vector.copy_(sent)
        mine.finish(begun)
        assert torch.equal(mine.fragments[0].outer, outer + sent)
        starts = torch.split(mine.fragments[0].outer, [1200, 7, 0])
        for one, now in zip(parameters.values(), starts, strict=True):
            assert torch.equal(one.flatten(), now.to(dtype))


@pytest.mark.parametrize(
    ("lr", "momentum", "nesterov"), [(1.0, 0.0, False), (0.3, 0.8, False), (0.7, 0.9, True)]
)
def test_the_outer_optimizer_is_sgd(lr: float, momentum: float, nesterov: bool) -> None:
    outer = torch.randn(100, generator=GENERATOR)
    expected = nn.Parameter(outer.clone())
    sgd = torch.optim.SGD([expected], lr=lr, momentum=momentum, nesterov=nesterov)
    ours, velocity = OuterSgd(lr=lr, momentum=momentum, nesterov=nesterov), None
    for _ in range(5):
        change = torch.randn(100, generator=GENERATOR)
        expected.grad = -change
        sgd.step()
        velocity = ours.step(outer, change, velocity)
        assert torch.equal(outer, expected)


def test_a_blend_is_streaming_dilocos_and_counts_no_step_twice() -> None:
    parameters = {"one": torch.zeros(1)}
    mine = replica(parameters, None, 0.0, 1.0, overlap=2, blend=0.25)
    parameters["one"] += 4.0
    begun = mine.begin(0)
    assert float(begun.vector) == 4.0
    parameters["one"] += 2.0
    # the other rank has changed nothing
    begun.vector.copy_(torch.tensor([2.0]))
    mine.finish(begun)
    assert float(mine.fragments[0].outer) == 2.0
    assert float(parameters["one"]) == 0.25 * 6.0 + 0.75 * 2.0
    # of the two steps beside the exchange a quarter is left, and all that the next change has
    assert float(mine.begin(0).vector) == 0.5


def test_a_blend_takes_no_rounding_for_a_change() -> None:
    ulp = 2.0**-7
    parameters = {"one": torch.ones(1, dtype=torch.bfloat16)}
    mine = replica(parameters, "fp32", 0.5, 1.0, overlap=1, blend=0.5, outer_lr=0.3)
    for _ in range(8):
        parameters["one"] += ulp
        begun = mine.begin(0)
        mine.finish(begun)
        # nothing has been changed since
        again = mine.begin(0)
        assert float(again.vector) == 0.0
        mine.release(again)


def test_a_round_that_a_run_with_overlap_had_under_way_keeps_the_steps_beside_it() -> None:
    parameters = {"one": torch.full((1,), 6.0)}
    mine = replica(parameters, "fp32", 0.5, 1.0)
    mine.fragments[0].outer.zero_()
    begun = mine.begin(0, torch.tensor([4.0]))
    assert float(begun.vector) == 4.0
    begun.vector.copy_(torch.tensor([3.0]))
    mine.finish(begun)
    assert float(parameters["one"]) == 3.0 + 2.0
    assert float(mine.begin(0).vector) == 2.0


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_parameter_that_is_frozen_rests(nesterov: bool) -> None:
    parameters: dict[str, Tensor] = {
        name: nn.Parameter(torch.zeros(3)) for name in ("frozen", "other")
    }
    mine = replica(parameters, "fp32", 0.5, 1.0, outer_momentum=0.9, nesterov=nesterov)
    seen = []
    with torch.no_grad():
        for step in range(6):
            parameters["frozen"].requires_grad_(step not in (2, 3))
            begun = mine.begin(0)
            # all that was changed before it was frozen has come at step 2
            begun.vector[:3] = 1.0 if step < 3 else 0.0
            begun.vector[3:] = 1.0 if step < 2 else 0.0
            mine.finish(begun)
            seen.append(mine.fragments[0].outer.clone())
    assert torch.equal(seen[2][:3], seen[1][:3] + 1.0)
    assert torch.equal(seen[3][:3], seen[2][:3])
    assert bool((seen[3][3:] > seen[2][3:]).all())
    # and its momentum with it
    assert torch.equal(seen[4][:3] - seen[3][:3], seen[2][3:] - seen[1][3:])


def test_without_a_blend_all_of_the_steps_beside_an_exchange_stays() -> None:
    parameters = {"one": torch.zeros(1)}
    mine = replica(parameters, "fp32", 0.5, 1.0, overlap=2)
    parameters["one"] += 4.0
    begun = mine.begin(0)
    parameters["one"] += 2.0
    begun.vector.copy_(torch.tensor([3.0]))
    mine.finish(begun)
    assert float(parameters["one"]) == 3.0 + 2.0
    assert float(mine.begin(0).vector) == 2.0


def test_fragments_are_runs_of_about_one_size() -> None:
    def sizes(numels: list[int], count: int) -> list[list[int]]:
        named = {f"p{place}": numel for place, numel in enumerate(numels)}
        return [[named[name] for name in run] for run in split_in_fragments(named, count)]

    assert sizes([1, 1, 1, 1], 2) == [[1, 1], [1, 1]]
    assert sizes([100, 1, 1, 1], 3) == [[100], [1], [1, 1]]
    assert sizes([1, 1, 1, 100], 2) == [[1, 1, 1], [100]]
    assert sizes([0, 0, 5], 3) == [[0], [0], [5]]
    with pytest.raises(ValueError, match="fragments=3: expected at most 2"):
        sizes([5, 5], 3)


def test_rounds_are_spread_over_the_period() -> None:
    spread = settings(every=10, fragments=4)
    assert spread.offsets == (3, 5, 8, 10)
    assert [step for step in range(1, 21) if spread.due(3, step)] == [10, 20]
    assert settings(every=1, fragments=3).offsets == (1, 1, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, "every=0: expected"),
        ({"every": 2.0}, "every=2.0: expected an integer"),
        ({"every": True}, "every=True: expected an integer"),
        ({"outer_lr": 0.0}, "outer_lr=0.0: expected a number above zero"),
        ({"outer_lr": float("nan")}, "outer_lr=nan"),
        ({"outer_momentum": 1.0}, "outer_momentum=1.0: expected a number in"),
        ({"nesterov": True}, "nesterov=True with outer_momentum=0.0"),
        ({"nesterov": 1}, "nesterov=1: expected True or False"),
        ({"fragments": 0}, "fragments=0: expected"),
        ({"fragments": 2, "offsets": (1,)}, "offsets=.* with fragments=2"),
        ({"fragments": 2, "offsets": (1, 5)}, "offsets=.* expected steps from 1 to every"),
        ({"overlap": 4}, "overlap=4: expected a number of steps from 0 to every - 1"),
        ({"overlap": -1}, "overlap=-1"),
        ({"overlap": 1, "blend": 1.0}, "blend=1.0: expected a number in"),
        ({"blend": 0.5}, "blend=0.5 with overlap=0: expected None"),
        ({"buffers": "mean"}, "buffers='mean': expected one of 'first', 'own'"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        settings(**options)

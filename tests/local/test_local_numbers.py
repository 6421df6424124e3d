"""The numbers of local steps: on gloo ranks, against one process, and against each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hook_cases import small_model
from local_cases import (
    LocalReference,
    backward,
    equal,
    inner_optimizer,
    local,
    numbers,
    train,
)
from ranks import run_ranks

pytestmark = [pytest.mark.gloo, pytest.mark.usefixtures("one_thread")]
STEPS = 9
NESTEROV: dict[str, Any] = {"outer_lr": 0.7, "outer_momentum": 0.9, "nesterov": True}
# steps of each parameter's rounds with every=4 and fragments=3
OFFSETS = {"0.weight": 2, "0.bias": 2, "2.weight": 3, "2.bias": 4, "4.weight": 4, "4.bias": 4}
CASES: dict[str, dict[str, Any]] = {
    "averages": {"every": 1, "q": 0.0},
    "averages, in three": {"every": 1, "q": 0.0, "fragments": 3},
    "averages after four": {"every": 4, "q": 0.0, "value_format": "fp32"},
    "sparse": {"every": 2, "q": 0.9, "value_format": None},
    "sparse, kept whole": {"every": 2, "q": 0.9, "value_format": "fp32", "residual_decay": 1.0},
    "nesterov": {"every": 3, "q": 0.5, "value_format": None, **NESTEROV},
    "in three": {"every": 4, "q": 0.9, "value_format": None, "fragments": 3},
    "every=1": {"every": 1, "q": 0.9},
    "every=1, in three": {"every": 1, "q": 0.9, "fragments": 3},
    "int2": {"every": 3, "q": 0.8},
    "int2, in three at once": {"every": 3, "q": 0.8, "fragments": 3, "offsets": (3, 3, 3)},
}


def trained(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for case, options in CASES.items():
        model, steps = local(rank, **options)
        train(model, steps, rank, 0, STEPS)
        results[case] = numbers(model)
        if "fragments" not in options:
            results[f"{case}, outer"] = steps.state_dict()["outer"]
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(4, trained, tmp_path_factory.mktemp("ranks"))


def averaged_each_step(every: int) -> dict[str, torch.Tensor]:
    models = [small_model(seed=0) for _ in range(4)]
    optimizers = [inner_optimizer(model) for model in models]
    for step in range(STEPS):
        for rank in range(4):
            backward(models[rank], step, rank)
            optimizers[rank].step()
        if (step + 1) % every == 0:
            with torch.no_grad():
                for same in zip(*(model.parameters() for model in models), strict=True):
                    mean = torch.stack(same).mean(0)
                    for parameter in same:
                        parameter.copy_(mean)
    return numbers(models[0])


@pytest.mark.parametrize(("case", "every"), [("averages", 1), ("averages, in three", 1)])
def test_everything_each_step_is_the_average_of_the_parameters(
    case: str, every: int, ranks: list[dict[str, Any]]
) -> None:
    expected = averaged_each_step(every)
    for rank in ranks:
        assert equal(rank[case], expected)


def test_everything_every_four_steps_ends_in_the_average_too(ranks: list[dict[str, Any]]) -> None:
    models = [rank["averages after four, outer"] for rank in ranks]
    assert all(equal(model, models[0]) for model in models)
    # the ninth step is each rank's own
    assert not equal(ranks[0]["averages after four"], ranks[1]["averages after four"])


@pytest.mark.parametrize("case", ["sparse", "sparse, kept whole", "nesterov", "in three"])
def test_four_ranks_are_the_reference_to_the_bit(case: str, ranks: list[dict[str, Any]]) -> None:
    options = CASES[case]
    reference = LocalReference(
        4,
        every=options["every"],
        q=options["q"],
        decay=options.get("residual_decay", 0.95),
        outer={
            "lr": options.get("outer_lr", 1.0),
            "momentum": options.get("outer_momentum", 0.0),
            "nesterov": options.get("nesterov", False),
        },
        offsets=OFFSETS if "fragments" in options else None,
    )
    for step in range(STEPS):
        reference.step(step)
    for rank, model in zip(ranks, reference.models, strict=True):
        assert equal(rank[case], numbers(model))


@pytest.mark.parametrize(
    ("one", "other"),
    [("every=1", "every=1, in three"), ("int2", "int2, in three at once")],
)
def test_fragments_that_are_exchanged_at_one_step_are_as_none(
    one: str, other: str, ranks: list[dict[str, Any]]
) -> None:
    for rank in ranks:
        assert equal(rank[one], rank[other])

"""No step ends in numbers that are not finite, whatever a worker sends; it is as if never taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from ps.training.test_central import SINGLE, Shapes, push_of, random_gradients, random_model

from topq_dist.ps.protocol.config import TrainingConfig
from topq_dist.ps.protocol.errors import InvalidError
from topq_dist.ps.protocol.types import Push
from topq_dist.ps.training.central import CentralModel
from topq_dist.ps.training.step_guard import NonFiniteStepError

SHAPES: dict[torch.dtype, Shapes] = {
    torch.float32: SINGLE,
    torch.float16: (("w", (40, 3), torch.float16),),
    torch.bfloat16: (("w", (40, 3), torch.bfloat16),),
    torch.float64: (("w", (40, 3), torch.float64),),
}
OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {"lr": 0.1}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    ("adamw", {"lr": 0.01, "eps": 1e-4}),
    ("adagrad", {"lr": 0.01, "eps": 1e-4}),
    ("rmsprop", {"lr": 0.01, "eps": 1e-4}),
]


POISONS: list[dict[str, Any]] = [
    {"lr": (1e300,)},
    {"lr": (1e30,), "scale": 1e30},
    {"scale": 1.0, "of_largest": 0.1},
    {"scale": 1.0, "of_largest": 0.1, "lr": (1000.0,)},
    {"momentum": (1 - 1e-16,), "lr": (1e30,)},
]


def central_of(dtype: torch.dtype, inner_opt: str = "sgd", **options: Any) -> CentralModel:
    model = random_model(SHAPES[dtype])
    downlink = options.pop("downlink", "exact")
    config = TrainingConfig(inner_opt=inner_opt, options=options, downlink=downlink)
    return CentralModel(config, model.spec, model)


def push(
    central: CentralModel, seed: int, *, scale: float = 1.0, of_largest: float = 0.0, **changes: Any
) -> Push:
    gradients = random_gradients(central._params, torch.Generator().manual_seed(seed))
    scaled = []
    for gradient in gradients:
        largest = torch.finfo(gradient.dtype).max
        factor = of_largest * largest or min(scale, largest / 8)
        scaled.append((factor * gradient.double().clamp(-4, 4)).to(gradient.dtype))
    return replace(push_of(central._params, scaled), **changes)


@pytest.mark.parametrize("dtype", SHAPES)
@pytest.mark.parametrize(("inner_opt", "options"), OPTIMIZERS)
@pytest.mark.parametrize("downlink", ["exact", "topq", "dense"])
def test_poison_leaves_nothing_behind(
    dtype: torch.dtype, inner_opt: str, options: dict[str, Any], downlink: str
) -> None:
    undisturbed, central = (
        central_of(dtype, inner_opt, downlink=downlink, **options) for _ in range(2)
    )
    refused = 0
    for step in range(3):
        saved = undisturbed.state()
        good = push(undisturbed, step)
        undisturbed.apply([good])
        for poison in POISONS:
            central.load_state(*saved)
            before = central.sha256()
            bad = push(central, 77, worker="m", **poison)
            why = refusal(central, [good, bad])
            assert central.is_finite()
            if why is None:
                continue
            refused += 1
            assert getattr(why, "workers", ("m",)) == ("m",)
            assert central.sha256() == before
            central.apply([good])
            assert central.sha256() == undisturbed.sha256()
    assert refused >= 3


def refusal(central: CentralModel, pushes: list[Push]) -> Exception | None:
    try:
        for one in pushes:
            central.check_push(one)
        central.apply(pushes)
    except (NonFiniteStepError, InvalidError) as error:
        return error
    return None


def test_poison_that_adds_up_is_noticed_before_it_is_infinite() -> None:
    central = central_of(torch.float16, "sgd", lr=0.1, downlink="topq")
    one = replace(push(central, 1), lr=(15.0,))
    for frame in one.frames:
        frame.values.fill_(15.0)
    whys = [refusal(central, [one]) for _ in range(400)]
    assert whys[0] is None
    assert isinstance(whys[-1], NonFiniteStepError)
    assert central.is_finite()


@pytest.mark.parametrize("dtype", SHAPES)
@pytest.mark.parametrize("inner_opt", ["sgd", "adam", "adamw", "adagrad"])
@pytest.mark.parametrize(
    "rates",
    [
        [{"lr": 1.0, "weight_decay": 1.0}],
        # the groups keep it where later pushes say nothing
        [{"lr": 0.0, "weight_decay": 1.0}, {"lr": 1.0}],
        [{"lr": 1.0, "weight_decay": 0.0}] * 5 + [{"lr": 1e-9, "weight_decay": 1.0}],
    ],
)
def test_no_weight_decay_multiplies_the_model_to_infinity(
    dtype: torch.dtype, inner_opt: str, rates: list[dict[str, float]]
) -> None:
    central = central_of(dtype, inner_opt, lr=1e-3, weight_decay=0.01)
    largest = 0.99 * torch.finfo(dtype).max ** 0.25  # of what is looked at for itself
    for step in range(70):
        numbers = rates[min(step, len(rates) - 1)]
        given: dict[str, Any] = {name: (largest * number,) for name, number in numbers.items()}
        refusal(central, [push(central, step, **given)])
        assert central.is_finite()


def test_where_a_run_diverges_by_itself_all_are_told() -> None:
    central = central_of(torch.float32, "sgd", lr=1000.0)
    why = None
    while why is None:
        # the gradient of x^2
        gradient = 2 * central._params.flats[0]
        ones = [replace(push_of(central._params, [gradient]), worker=name) for name in "ab"]
        why = refusal(central, ones)
        assert central.is_finite()
    assert isinstance(why, NonFiniteStepError)
    assert why.workers == ("a", "b")


def test_steps_as_ever_make_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    central = central_of(torch.float32, "adamw", lr=0.01)
    copies = []
    state = central.state

    def counted(*, copied: bool = True) -> Any:
        copies.append(copied)
        return state(copied=copied)

    monkeypatch.setattr(central, "state", counted)
    for step in range(130):
        central.apply([push(central, step)])
    assert copies == [False, False, False]


@pytest.mark.parametrize("inner_opt", ["adamw", "adafactor", "sgd"])
def test_a_tensor_of_very_many_dimensions_costs_no_more_than_its_elements(inner_opt: str) -> None:
    shapes: Shapes = (
        ("deep", (1,) * 34, torch.float32),
        ("long", (1, 3, 1, 2, 5, 3), torch.float32),
        ("w", (3, 2), torch.float32),
    )
    model = random_model(shapes)
    options = {"lr": 0.01, **({"momentum": 0.9} if inner_opt == "sgd" else {})}
    central = CentralModel(TrainingConfig(inner_opt=inner_opt, options=options), model.spec, model)
    central.apply([push(central, 1)])
    before = central.sha256()
    central.load_state(*central.state())
    with pytest.raises(NonFiniteStepError):
        central.apply([push(central, 2, of_largest=0.1, lr=(1e300,))])
    assert central.sha256() == before
    central.apply([push(central, 3)])

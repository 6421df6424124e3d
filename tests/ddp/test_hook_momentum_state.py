"""Saved states of each momentum: resumed to the bit, by other numbers of ranks, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ddp.momentum_hooks import (
    METHODS,
    STEPS,
    adamw,
    assert_same,
    hooked,
    sgd,
    through_a_file,
    train,
)
from ranks import run_ranks

pytestmark = pytest.mark.gloo


def resumed(rank: int) -> bool:
    for method in METHODS:
        for make in (adamw,) if method == "adam" else (sgd, adamw):
            model, optimizer, state = hooked(make, momentum=method, adapt_rate=True)
            train(model, optimizer, rank, *range(4))
            saved = through_a_file(
                {"hook": state.state_dict(), "optimizer": optimizer.state_dict()}
            )
            other, reference, resuming = hooked(make, momentum=method, adapt_rate=True)
            other.load_state_dict(model.state_dict())
            reference.load_state_dict(saved["optimizer"])
            resuming.load_state_dict(saved["hook"])
            for one, stepping in ((model, optimizer), (other, reference)):
                train(one, stepping, rank, *range(4, 8))
            assert_same(model, other, f"{method} {make.__name__}")
            again, before = resuming.state_dict(), state.state_dict()
            for name, residual in before["residuals"].items():
                assert torch.equal(residual, again["residuals"][name])
    return True


def refused_states(rank: int) -> bool:
    corrected, own_adam = (hooked(adamw, momentum=method) for method in ("corrected", "adam"))
    feedback = hooked(adamw)
    for model, optimizer, _ in (corrected, own_adam, feedback):
        train(model, optimizer, rank, 0, 1)
    states: dict[str, dict[str, Any]] = {
        method: kind[2].state_dict()
        for method, kind in zip(METHODS[:3], (feedback, corrected, own_adam), strict=True)
    }
    # an older hook's state, and the plain method's
    for kind in (feedback, corrected):
        old = {key: value for key, value in states["feedback"].items() if key != "momentum"}
        kind[2].load_state_dict(old)
        kind[2].load_state_dict(states["feedback"])
        assert kind[2].state_dict()["momentum"]["unit"] == "gradient"
        train(kind[0], kind[1], rank, 2, 3)
    name = next(iter(states["corrected"]["residuals"]))
    bad = [
        (feedback, states["corrected"]),
        (feedback, states["adam"]),
        (corrected, states["adam"]),
        (own_adam, states["feedback"]),
        (own_adam, states["corrected"]),
        (feedback, states["feedback"] | {"momentum": 3}),
    ]
    for wrong_sums in (None, [1.0], [1.0, -1.0], [float("nan"), 1.0], ["much", "little"]):
        momentum = states["feedback"]["momentum"] | {"coherence": wrong_sums}
        bad.append((feedback, states["feedback"] | {"momentum": momentum}))
    for state, key in (("corrected", "velocity"), ("adam", "first"), ("adam", "steps")):
        kind = corrected if state == "corrected" else own_adam
        for wrong in (None, {name: torch.zeros(1)}, {"nowhere": torch.zeros(1)}, {name: "much"}):
            momentum = states[state]["momentum"] | {key: wrong}
            bad.append((kind, states[state] | {"momentum": momentum}))
    for kind, wrong_state in bad:
        before = kind[2].state_dict()
        with pytest.raises((TypeError, ValueError), match="expected"):
            kind[2].load_state_dict(wrong_state)
        after = kind[2].state_dict()
        assert before["momentum"].keys() == after["momentum"].keys()
        for one, other in zip(
            before["residuals"].values(), after["residuals"].values(), strict=True
        ):
            assert torch.equal(one, other)
    return True


def resumed_and_refused(rank: int) -> bool:
    return resumed(rank) and refused_states(rank)


def test_each_method_resumes_to_the_bit_and_names_states_that_do_not_fit(tmp_path: Path) -> None:
    assert run_ranks(2, resumed_and_refused, tmp_path) == [True, True]


def saved_by_four(rank: int) -> list[dict[str, Any]]:
    saved = []
    for method in METHODS[:3]:
        model, optimizer, state = hooked(adamw if method == "adam" else sgd, momentum=method)
        train(model, optimizer, rank)
        saved.append(state.state_dict())
    return saved


def load_and_return(rank: int, states: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    taken = []
    for number, method in enumerate(METHODS[:3]):
        model, optimizer, state = hooked(adamw if method == "adam" else sgd, momentum=method)
        state.load_state_dict([saved[number] for saved in states])
        taken.append(state.state_dict())
        train(model, optimizer, rank)
    return taken


def test_another_world_size_keeps_sums_and_averages_moments(tmp_path: Path) -> None:
    states = run_ranks(4, saved_by_four, tmp_path)
    for world_size in (1, 3, 5):
        taken = run_ranks(world_size, load_and_return, tmp_path, states)
        for number in range(3):
            for key in ("residuals", "velocity"):
                before, after = (
                    [one[number] | one[number]["momentum"] for one in ranks]
                    for ranks in (states, taken)
                )
                for name in before[0].get(key, {}):
                    total = torch.stack([one[key][name].double() for one in before]).sum(0)
                    held = [one[key][name].double() for one in after if name in one[key]]
                    torch.testing.assert_close(
                        torch.stack(held).sum(0), total, rtol=1e-5, atol=1e-6
                    )
        assert taken[0][1]["momentum"]["velocity"]
        for moment in ("first", "second"):
            for name in states[0][2]["momentum"][moment]:
                mean = sum(one[2]["momentum"][moment][name].double() for one in states) / 4
                for one in taken:
                    held = one[2]["momentum"][moment][name].double()
                    torch.testing.assert_close(held, mean, rtol=1e-5, atol=1e-9)
                    assert one[2]["momentum"]["steps"][name] == STEPS

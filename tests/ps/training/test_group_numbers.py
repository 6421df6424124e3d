"""Rates, momenta and weight decays of several workers: the median counts, and they are told."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from ps.client.test_optimizer import connect
from ps.servers import serving
from ps.training.test_central import SINGLE, push_of, random_gradients, random_model
from ps.workers import backward, batch, make_model, side_by_side

from topq_dist.ps.protocol.config import GroupRule, TrainingConfig
from topq_dist.ps.protocol.errors import InvalidError, NonFiniteError
from topq_dist.ps.protocol.types import Push
from topq_dist.ps.training.central import CentralModel
from topq_dist.ps.training.group_numbers import medians

SGD = {"inner_opt": "sgd", "options": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}}


def central_of(**config: Any) -> CentralModel:
    model = random_model(SINGLE)
    return CentralModel(TrainingConfig(**{**SGD, **config}), model.spec, model)


def pushes(central: CentralModel, **numbers: Any) -> list[Push]:
    """Return a push of each worker, a, b and so on, with the numbers listed for it."""
    model = random_model(SINGLE)
    gradient = random_gradients(model, torch.Generator().manual_seed(1))
    count = len(next(iter(numbers.values())))
    return [
        dataclasses.replace(
            push_of(model, gradient),
            worker="abcdefg"[place],
            **{name: values[place] for name, values in numbers.items()},
        )
        for place in range(count)
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([(0.1,)], (0.1,)),
        ([(0.1,), (0.1,)], (0.1,)),
        ([(0.0,), (0.1,)], (0.05,)),
        ([(0.0,), (0.1,), (0.1,)], (0.1,)),
        ([(1e300,), (0.1,), (0.2,)], (0.2,)),
        ([(0.0,), (0.1,), (0.3,), (9.0,)], (0.2,)),
        ([(1.7e308,), (1.6e308,)], (1.65e308,)),
        ([(0.3, 1.0), (0.1, 3.0), (0.2, 2.0)], (0.2, 2.0)),
    ],
)
def test_the_median_of_what_workers_say(
    given: list[tuple[float, ...]], expected: tuple[float, ...]
) -> None:
    assert medians(given) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["lr", "weight_decay", "momentum"])
def test_no_worker_rules_the_others_numbers(name: str, caplog: pytest.LogCaptureFixture) -> None:
    central = central_of()
    central.apply(pushes(central, **{name: [(0.0,), (0.25,), (0.25,)]}))
    assert central.groups()[0].numbers[name] == 0.25
    assert "a sent 0, b sent 0.25, c sent 0.25; the median, 0.25, counts" in central.disagreement
    # who says nothing has no say, and is told
    central.apply(pushes(central, **{name: [(0.5,), (), ()]}))
    assert central.groups()[0].numbers[name] == 0.5
    assert "a sent 0.5, b sent none, c sent none; the median, 0.5, counts" in central.disagreement
    central.apply(pushes(central, **{name: [(0.5,), (), ()]}))
    assert central.disagreement == ""
    central.apply(pushes(central, **{name: [(), (), ()]}))
    assert central.groups()[0].numbers[name] == 0.5
    central.apply(pushes(central, **{name: [(0.0,), (0.25,), (0.75,)]}))
    assert len([r for r in caplog.records if "do not agree" in r.message]) == 1


def test_a_worker_that_never_changed_its_rate_is_told_of_anothers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with serving(tmp_path, SGD, start_workers=2) as server:

        def work(worker: int) -> None:
            model = make_model()
            with connect(model, server, worker=worker) as optimizer:
                if worker == 0:
                    optimizer.param_groups[0]["lr"] = 0.0
                for step in range(3):
                    optimizer.zero_grad()
                    backward(model, [batch(worker, step)])
                    optimizer.step()

        side_by_side(2, work)
    told = [r.message for r in caplog.records if r.name.endswith("server_client")]
    assert len(told) == 2
    assert all("lr of group 0: w0 sent 0, w1 sent none" in one for one in told)


def test_workers_that_agree_have_their_bits() -> None:
    central = central_of()
    lr = 0.1 / 3
    central.apply(pushes(central, lr=[(lr,), (lr,)]))
    assert central.groups()[0].numbers["lr"] == lr


def test_a_long_list_of_workers_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    central = central_of(groups=(GroupRule(pattern="*.bias", options={"lr": 0.2}),))
    central.apply(pushes(central, lr=[(0.5, place / 8) for place in range(7)]))
    assert "lr of group 1: a sent 0, b sent 0.125" in central.disagreement
    assert "and 3 more; the median, 0.375, counts" in central.disagreement


@pytest.mark.parametrize(
    ("decay", "error", "message"),
    [
        ((0.1, 0.1), InvalidError, "2 weight decays: expected one for each of 1 groups"),
        ((-0.1,), InvalidError, "weight_decay=-0.1: expected 0 or more"),
        ((float("inf"),), NonFiniteError, "weight_decay=inf: expected a finite number"),
    ],
)
def test_a_weight_decay_that_is_none_is_refused(
    decay: tuple[float, ...], error: type[Exception], message: str
) -> None:
    central = central_of()
    (push,) = pushes(central, weight_decay=[decay])
    with pytest.raises(error, match=message):
        central.check_push(push)


@pytest.mark.parametrize(
    ("config", "numbers", "message"),
    [
        ({}, {"lr": 0.5}, ""),
        ({}, {"lr": 0.51}, "lr=0.51: expected at most 0.5, which is this server's max_lr"),
        ({}, {"lr": 0.25, "momentum": 0.95}, ""),
        ({}, {"lr": 0.5, "momentum": 0.5}, ""),
        ({}, {"lr": 0.25, "momentum": 0.96}, "momentum=0.96 at lr=0.25: expected steps no longer"),
        ({}, {"momentum": 1 - 1e-9}, "max_lr=0.5 makes them with momentum=0.9, as its run began"),
        ({}, {"weight_decay": 0.99}, ""),
        ({}, {"weight_decay": 1.1}, "lr=0.1 with weight_decay=1.1 is a decay of 1.1 a step"),
        ({}, {"weight_decay": 4e9}, "beyond which a step turns weights round"),
        ({"options": {"lr": 0.1, "weight_decay": 30.0}}, {"lr": 0.1}, ""),
        ({"inner_opt": "adamw", "options": {"lr": 0.1}}, {"lr": 0.5, "momentum": 0.99}, ""),
    ],
)
def test_one_worker_sets_no_step_that_is_longer_than_max_lr_or_inverts_weights(
    config: dict[str, Any], numbers: dict[str, float], message: str
) -> None:
    central = central_of(**config)
    (push,) = pushes(central, **{name: [(number,)] for name, number in numbers.items()})
    central.check_push(push)
    if not message:
        central.check_push(push, max_lr=0.5)
        return
    with pytest.raises(InvalidError, match=re.escape(message)):
        central.check_push(push, max_lr=0.5)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"weight_decay": 1e6}, "lr=0.1 with weight_decay=1000000.0 is a decay of 1e+06 a step"),
        ({"momentum": 1 - 1e-9}, "at lr=0.1: expected steps no longer than this server's max_lr"),
        ({"momentum": 1 - 2e-5}, "lr=0.1 with weight_decay=0.01 is a decay of 50 a step"),
        ({"momentum": 0.0, "weight_decay": 5.0}, "lr=0.1 with weight_decay=5.0 is a decay of 5"),
    ],
)
def test_a_low_rate_of_one_worker_excuses_nothing_beside_the_others(
    numbers: dict[str, float], message: str
) -> None:
    central = central_of()
    (push,) = pushes(central, lr=[(0.0,)], **{name: [(one,)] for name, one in numbers.items()})
    with pytest.raises(InvalidError, match=re.escape(message)):
        central.check_push(push, max_lr=1000.0)


@pytest.mark.parametrize("inner_opt", ["adam", "adamw", "adamax", "radam"])
def test_one_worker_sets_no_beta1_that_lengthens_a_step_beyond_max_lr(inner_opt: str) -> None:
    central = central_of(inner_opt=inner_opt, options={"lr": 0.1})
    (high,) = pushes(central, lr=[(0.1,)], momentum=[(1 - 2.0**-53,)])
    with pytest.raises(InvalidError, match="and step 2"):
        central.check_push(high, max_lr=1000.0)  # a low one may be applied before it
    (low,) = pushes(central, lr=[(0.1,)], momentum=[(0.0,)])
    central.check_push(low, max_lr=1000.0)
    central.apply([low])
    for lr in (0.1, 0.0):  # the others' rates count beside it
        (push,) = pushes(central, lr=[(lr,)], momentum=[(1 - 2.0**-53,)])
        with pytest.raises(InvalidError, match=r"beta1=0.999.* at lr=0.1 and step 2: expected"):
            central.check_push(push, max_lr=1000.0)
    (cycled,) = pushes(central, lr=[(0.1,)], momentum=[(0.999,)])
    central.check_push(cycled, max_lr=1000.0)


def test_no_beta1_is_refused_late_in_a_run_nor_for_what_another_worker_has_sent() -> None:
    central = central_of(inner_opt="adamw", options={"lr": 0.1})
    (high,) = pushes(central, lr=[(0.1,)], momentum=[(0.999,)])
    for _ in range(3):
        central.apply([high])
    (again,) = pushes(central, lr=[(0.1,)], momentum=[(0.999,)])
    central.check_push(again, max_lr=0.11)
    (raised,) = pushes(central, lr=[(0.1,)], momentum=[(0.9991,)])
    with pytest.raises(InvalidError, match=r"beta1=0.9991 at lr=0.1 and step 4"):
        central.check_push(raised, max_lr=0.11)
    for _ in range(200):
        central.apply([high])
    (late,) = pushes(central, lr=[(0.1,)], momentum=[(0.9995,)])
    central.check_push(late, max_lr=2.0)


@pytest.mark.parametrize("steps", [10, 300])
def test_no_schedule_that_cycles_beta1_is_refused_at_the_highest_rate(steps: int) -> None:
    central = central_of(inner_opt="adamw", options={"lr": 0.01})
    own = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(own, max_lr=0.01, total_steps=steps)
    for _ in range(steps - 1):
        (group,) = own.param_groups
        (push,) = pushes(central, lr=[(group["lr"],)], momentum=[(group["betas"][0],)])
        central.check_push(push, max_lr=0.01)
        central.apply([push])
        own.step()
        schedule.step()


def test_no_push_is_refused_for_what_another_worker_has_sent() -> None:
    central = central_of(options={"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01})
    # as replays are taken, whose limit may have been another one
    central.apply(pushes(central, lr=[(0.0,)], momentum=[(1 - 1e-9,)], weight_decay=[(1e6,)]))
    honest: dict[str, float]
    for honest in (
        {"lr": 0.1},
        {"lr": 0.05, "momentum": 0.5},
        {"weight_decay": 0.01},
        {"momentum": 0.4},
    ):
        (push,) = pushes(central, **{name: [(number,)] for name, number in honest.items()})
        central.check_push(push, max_lr=1000.0)
    (push,) = pushes(central, lr=[(0.2,)])
    with pytest.raises(InvalidError, match=r"lr=0.2"):
        central.check_push(push, max_lr=1000.0)


def test_an_optimizer_without_weight_decay_takes_none() -> None:
    central = central_of(inner_opt="rprop", options={"lr": 0.1})
    (push,) = pushes(central, weight_decay=[(0.1,)])
    assert not central.groups()[0].takes_weight_decay
    with pytest.raises(InvalidError, match="Rprop has no weight_decay"):
        central.check_push(push)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_workers_on_different_schedules_are_told_once(
    tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with serving(tmp_path, {**SGD, "mode": mode}, start_workers=2) as server:

        def work(worker: int) -> float:
            model = make_model()
            with connect(model, server, worker=worker) as optimizer:
                optimizer.param_groups[0]["lr"] = (0.2, 0.4)[worker]
                for step in range(4):
                    optimizer.zero_grad()
                    backward(model, [batch(worker, step)])
                    optimizer.step()
            return server.coordinator._started().central.groups()[0].numbers["lr"]

        rates = side_by_side(2, work)
    told = [r.message for r in caplog.records if r.name.endswith("server_client")]
    if mode == "async":  # a version has one push, at that worker's rate
        assert not told
        return
    assert rates == pytest.approx([0.3, 0.3])
    assert len(told) == 2
    assert all("w0 sent 0.2, w1 sent 0.4; the median, 0.3, counts" in one for one in told)

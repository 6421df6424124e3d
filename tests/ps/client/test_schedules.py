"""torch's schedulers on the servers' groups: rate, momentum, betas and weight decay."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ps.client.test_optimizer import ADAMW, connect
from ps.servers import Options, serving
from ps.workers import backward, batch, make_model, values

from topq_dist.ps.client.param_groups import ServerGroups
from topq_dist.ps.protocol.types import GroupView

STEPS = 12
DECAYED: Options = {
    "inner_opt": "sgd",
    "options": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05},
}
CLASSES = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
schedulers = torch.optim.lr_scheduler


class CosineWeightDecay:
    """Weight decay from what it is to ten times that, on a cosine, as vision transformers do."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._groups, self._steps = optimizer.param_groups, 0
        self._first = [group["weight_decay"] for group in optimizer.param_groups]

    def step(self) -> None:
        self._steps += 1
        times = 10 - 9 * (1 + math.cos(math.pi * self._steps / STEPS)) / 2
        for group, first in zip(self._groups, self._first, strict=True):
            group["weight_decay"] = times * first


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "one cycle": lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=STEPS + 1),
    "one cycle of the rate": lambda o: schedulers.OneCycleLR(
        o, max_lr=0.1, total_steps=STEPS + 1, cycle_momentum=False
    ),
    "cycles": lambda o: schedulers.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, STEPS),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 4),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda step: 0.9**step),
    "warm-up from 0": lambda o: schedulers.LambdaLR(o, lambda step: step / STEPS),
    "one after another": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o), schedulers.ExponentialLR(o, 0.8)], [4]
    ),
    "weight decay": CosineWeightDecay,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("training", [DECAYED, ADAMW], ids=["sgd", "adamw"])
def test_a_schedule_does_what_it_does_to_torchs_optimizer(
    tmp_path: Path, training: Options, schedule: str
) -> None:
    alone, model = make_model(), make_model()
    reference = CLASSES[training["inner_opt"]](alone.parameters(), **training["options"])
    with serving(tmp_path, training) as server, connect(model, server) as optimizer:
        both = [SCHEDULES[schedule](each) for each in (reference, optimizer)]
        for step in range(STEPS):
            for one, each in ((alone, reference), (model, optimizer)):
                each.zero_grad()
                backward(one, [batch(0, step)])
                each.step()
            for scheduler in both:
                scheduler.step()
        torch.testing.assert_close(values(model), values(alone), rtol=1e-4, atol=1e-5)
        own, torchs = optimizer.param_groups[0], reference.param_groups[0]
        for name in ("lr", "momentum", "betas", "weight_decay"):
            assert own.get(name) == pytest.approx(torchs.get(name)), name


def test_a_schedule_of_weight_decay_survives_a_resume(tmp_path: Path) -> None:
    model = make_model()
    with serving(tmp_path, DECAYED) as server:
        with connect(model, server) as optimizer:
            optimizer.param_groups[0]["weight_decay"] = 0.25
            backward(model, [batch(0, 0)])
            optimizer.step()
            state, weights = optimizer.state_dict(), model.state_dict()
        with connect(model, server) as optimizer:
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
            assert optimizer.param_groups[0]["weight_decay"] == 0.25
            backward(model, [batch(0, 1)])
            optimizer.step()
            central = server.coordinator._started().central
            assert central.groups()[0].numbers["weight_decay"] == 0.25
            old = optimizer.state_dict()
            del old["topq"]["sends_weight_decay"], old["topq"]["told_weight_decay"]
            optimizer.load_state_dict(old)
            optimizer.step()


class TestTheGroupsOfAWorker:
    VIEW = GroupView(
        names=("w",), numbers={"lr": 0.1, "weight_decay": 0.01}, takes_weight_decay=True
    )

    def test_send_weight_decay_once_it_was_changed(self) -> None:
        groups = ServerGroups([[self.VIEW], [GroupView(names=("v",), numbers={"lr": 0.1})]])
        own: list[dict[str, Any]] = [{"weight_decay": 0.01}, {}]
        assert groups.weight_decays(own) == [(), ()]
        own[0]["weight_decay"] = 0.02
        assert groups.weight_decays(own) == [(0.02,), ()]
        own[0]["weight_decay"] = 0.01
        assert groups.weight_decays(own) == [(0.01,), ()]

    @pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
    def test_refuse_what_is_none(self, value: float) -> None:
        with pytest.raises(ValueError, match=r"weight_decay=.* in param_groups\[0\]: expected"):
            ServerGroups([[self.VIEW]]).weight_decays([{"weight_decay": value}])

    def test_name_the_remedy_where_a_server_is_older(self) -> None:
        groups = ServerGroups([[GroupView(names=("w",), numbers=self.VIEW.numbers)]])
        with pytest.raises(ValueError, match=r"expected 0.01, as the server has it.*lr alone"):
            groups.rates([{"lr": 0.1, "weight_decay": 0.02}])

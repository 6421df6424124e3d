"""q's policies in a worker: resumed on the same path, and refused with another's state."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from ps.client.test_worker_state import saved_and_read
from ps.servers import Options, serving
from ps.workers import backward, batch, make_model, values
from torch import nn

from topq_dist import QByLoss, QByTensor, QSchedule
from topq_dist.ps import ParameterServerOptimizer

SGD: Options = {"inner_opt": "sgd", "options": {"lr": 0.1}}
WARM_UP = QSchedule(start=0.5, end=0.95, steps=6)
POLICIES: dict[str, Any] = {
    "schedule": WARM_UP,
    "by tensor": QByTensor(q=WARM_UP, patterns={"0.*": 0.5}, whole_vectors=True),
    "by loss": QByLoss(energy=0.7, budget_bytes=2_000),
}


def connect(model: nn.Module, address: object, q: Any) -> ParameterServerOptimizer:
    return ParameterServerOptimizer(
        model.named_parameters(), str(address), q=q, worker="w", value_format="ec2", timeout_s=30
    )


def step(model: nn.Module, optimizer: ParameterServerOptimizer, number: int) -> int:
    """Take a step; return the bytes that it sent."""
    before = optimizer.stats().sent_bytes
    optimizer.zero_grad()
    backward(model, [batch(0, number)])
    optimizer.step()
    return optimizer.stats().sent_bytes - before


@pytest.mark.parametrize("case", POLICIES)
def test_resumed_it_walks_the_same_path(case: str, tmp_path: Path) -> None:
    policy = POLICIES[case]
    with serving(tmp_path, SGD) as server:
        model = make_model()
        optimizer = connect(model, server.address, policy)
        assert optimizer.q == policy
        sent_bytes = []
        for number in range(6):
            if number == 3:
                state, then = saved_and_read(optimizer), copy.deepcopy(model.state_dict())
            sent_bytes.append(step(model, optimizer, number))
        expected = values(model)
        assert state["topq"]["density"] == {"policy": repr(policy), "step": 3}
        again = make_model()
        resumed = connect(again, server.address, policy)
        resumed.load_state_dict(state)
        again.load_state_dict(then)
        assert [step(again, resumed, number) for number in range(3, 6)] == sent_bytes[3:]
        # gradients that were not those of before would have made a step of their own
        assert server.coordinator.status().point.version == 6
        assert torch.equal(values(again), expected)
        if case == "schedule":
            assert sent_bytes == sorted(sent_bytes, reverse=True)
            assert sent_bytes[0] > sent_bytes[-1]
        if case == "by loss":
            assert max(sent_bytes) <= 2_000
        resumed.close()


def test_a_state_of_another_policy_changes_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, SGD) as server:
        model = make_model()
        with connect(model, server.address, WARM_UP) as optimizer:
            step(model, optimizer, 0)
            state = saved_and_read(optimizer)
            optimizer.q = 0.9
            with pytest.raises(ValueError, match=r"state is of q=QSchedule\(start=0.5, .* 0.9;"):
                optimizer.load_state_dict(state)
            step(model, optimizer, 1)
            of_number = saved_and_read(optimizer)
            optimizer.q = WARM_UP
            with pytest.raises(ValueError, match=r"state is of q=0.9: expected QSchedule"):
                optimizer.load_state_dict(of_number)
            # one of before there were policies
            del of_number["topq"]["density"]
            optimizer.load_state_dict(of_number)
            with pytest.raises(TypeError, match="density=3: expected a dict"):
                optimizer.load_state_dict({**state, "topq": {**state["topq"], "density": 3}})
            with pytest.raises(TypeError, match="q='all': expected a number"):
                optimizer.q = "all"  # type: ignore[assignment]
            assert optimizer.q == WARM_UP
        for q in (QByTensor(q=0.5, patterns={"9": 0.1}), QByLoss(energy=0.5, budget_bytes=9)):
            with pytest.raises(ValueError, match=r"fits no parameter|budget_bytes=9"):
                connect(make_model(), server.address, q)

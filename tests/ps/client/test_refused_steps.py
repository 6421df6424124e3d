"""A step whose push no server will take is over: what the error asks for can be done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ps.client.test_optimizer import PLAIN, connect, gradient_of
from ps.servers import serving
from ps.workers import backward, batch, make_model, values
from torch import Tensor, nn

from topq_dist.ps import ParameterServerOptimizer
from topq_dist.ps.protocol.errors import InvalidError, NonFiniteError


def take_step(optimizer: ParameterServerOptimizer, model: nn.Module, *steps: int) -> Tensor:
    optimizer.zero_grad()
    for step in steps:
        backward(model, [batch(0, step)])
    optimizer.step()
    return values(model)


def alone(*steps: int) -> Tensor:
    """Return what torch makes of the sum of these steps' gradients."""
    model = make_model()
    for step in steps:
        backward(model, [batch(0, step)])
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return values(model)


def version_of(server: Any) -> int:
    version: int = server.coordinator.status().point.version
    return version


def test_a_rate_that_the_server_refuses_can_be_lowered(tmp_path: Path) -> None:
    model = make_model()
    with serving(tmp_path, PLAIN, max_lr=1.0) as server, connect(model, server) as optimizer:
        optimizer.param_groups[0]["lr"] = 2.0
        for _ in range(2):
            with pytest.raises(InvalidError, match=r"lr=2\.0: expected at most 1"):
                take_step(optimizer, model, 0)
        assert not optimizer.state_dict()["topq"]["open"]
        optimizer.param_groups[0]["lr"] = 0.1
        # the gradients of the refused ones come with it, at its rate
        torch.testing.assert_close(take_step(optimizer, model, 1), alone(0, 0, 1))
        assert (version_of(server), optimizer.stats().steps) == (1, 1)


@pytest.mark.parametrize("q", [0.0, 0.9])
def test_a_step_that_would_overflow_leaves_nothing_behind(tmp_path: Path, q: float) -> None:
    model = make_model()
    with serving(tmp_path, PLAIN) as server, connect(model, server, q=q) as optimizer:
        backward(model, [batch(0, 0)])
        optimizer.param_groups[0]["lr"] = 100.0
        gradient_of(model, "0.weight").fill_(3e38)
        with pytest.raises(NonFiniteError, match="expected a smaller gradient"):
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1
        after = take_step(optimizer, model, 1)
        assert version_of(server) == 1
        if q == 0.0:
            torch.testing.assert_close(after, alone(1))
        assert float((after - alone(1)).abs().max()) < 1.0


def test_one_of_two_servers_refuses_and_the_other_has_applied(tmp_path: Path) -> None:
    model = make_model()
    with (
        serving(tmp_path / "1", PLAIN) as one,
        serving(tmp_path / "2", PLAIN, max_lr=1.0) as two,
        connect(model, one, two) as optimizer,
    ):
        for group in optimizer.param_groups:
            group["lr"] = 2.0
        with pytest.raises(InvalidError, match="expected at most 1"):
            take_step(optimizer, model, 0)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        take_step(optimizer, model, 1)
        assert (version_of(one), version_of(two)) == (2, 1)

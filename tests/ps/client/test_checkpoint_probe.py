"""torch's checkpoint functions, which step an optimizer without state to look at it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ps.client.test_optimizer import ADAMW, SGD, connect
from ps.servers import Options, serving
from ps.workers import backward, batch, make_model, side_by_side, values
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)

from topq_dist.ps import ParameterServerOptimizer

Probe = Callable[[nn.Module, torch.optim.Optimizer], Any]
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
PROBES: dict[str, Probe] = {
    "get": get_optimizer_state_dict,
    "get, flattened": lambda model, optimizer: get_optimizer_state_dict(
        model, optimizer, options=FLAT
    ),
    "get both": get_state_dict,
    "set": lambda model, optimizer: set_optimizer_state_dict(
        model, optimizer, {"state": {}, "param_groups": []}
    ),
    "set, flattened": lambda model, optimizer: set_optimizer_state_dict(
        model, optimizer, {"param_groups.0.weight.lr": {}}, options=FLAT
    ),
}


@pytest.fixture(params=PROBES)
def probe(request: pytest.FixtureRequest) -> Probe:
    return PROBES[request.param]


@pytest.mark.parametrize("training", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("has_gradients", [False, True])
def test_they_are_refused_and_nothing_is_pushed(
    tmp_path: Path, probe: Probe, training: Options, has_gradients: bool
) -> None:
    model = make_model()
    with serving(tmp_path, training) as server, connect(model, server, q=0.9) as optimizer:
        for step in range(2):
            optimizer.zero_grad()
            backward(model, [batch(0, step)])
            optimizer.step()
        if not has_gradients:
            optimizer.zero_grad()
        before = optimizer.fetch_central(), optimizer.state_dict(), values(model)
        with pytest.raises(RuntimeError, match=r"save optimizer\.state_dict\(\) with torch\.save"):
            probe(model, optimizer)
        after = optimizer.fetch_central(), optimizer.state_dict(), values(model)
        assert server.coordinator.status().point.version == 2
        if not has_gradients:
            assert all(parameter.grad is None for parameter in model.parameters())
    for name, tensor in before[0].items():
        assert torch.equal(tensor, after[0][name])
    assert torch.equal(before[2], after[2])
    assert before[1]["param_groups"] == after[1]["param_groups"]
    kept = [state["topq"]["servers"][0]["residuals"] for state in (before[1], after[1])]
    assert all(torch.equal(residual, kept[1][name]) for name, residual in kept[0].items())
    assert any(bool(residual.any()) for residual in kept[0].values())


def test_one_worker_that_is_asked_holds_up_nobody(tmp_path: Path) -> None:
    def train(folder: str, probed: bool) -> torch.Tensor:
        with serving(tmp_path / folder, SGD, start_workers=2) as server:

            def work(worker: int) -> torch.Tensor:
                model = make_model()
                with connect(model, server, worker=worker, q=0.5) as optimizer:
                    for step in range(6):
                        optimizer.zero_grad()
                        if probed and worker == 0:
                            with pytest.raises(RuntimeError, match="state_dict"):
                                get_optimizer_state_dict(model, optimizer)
                        backward(model, [batch(worker, step)])
                        optimizer.step()
                return values(model)

            return torch.stack(side_by_side(2, work))

    assert torch.equal(train("asked", True), train("left alone", False))


def test_its_state_is_still_a_dict_that_is_empty(tmp_path: Path) -> None:
    model = make_model()
    with serving(tmp_path, SGD) as server, connect(model, server) as optimizer:
        assert isinstance(optimizer, ParameterServerOptimizer)
        assert len(optimizer.state) == 0
        assert list(optimizer.state.items()) == []
        optimizer.load_state_dict(optimizer.state_dict())
        with pytest.raises(RuntimeError, match="at the servers"):
            bool(optimizer.state)

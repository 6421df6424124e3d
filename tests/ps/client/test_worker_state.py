"""A worker's saved state: the same path again, another one, and states that do not fit."""

from __future__ import annotations

import copy
import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from ps.servers import Options, serving
from ps.workers import backward, batch, make_model, values
from server_process import ServerProcess
from torch import Tensor, nn

from topq_dist.ps import ParameterServerOptimizer
from topq_dist.ps.client.param_groups import ServerGroups
from topq_dist.ps.client.server_client import ServerClient
from topq_dist.ps.protocol.errors import FencedError, ServerLostError, WrongRunError
from topq_dist.ps.protocol.types import GroupView
from topq_dist.ps.server.process import ParameterServer

SGD: Options = {"inner_opt": "sgd", "options": {"lr": 0.1, "momentum": 0.9}}
ADAMW: Options = {"inner_opt": "adamw", "options": {"lr": 0.01, "weight_decay": 0.1}}


def connect(
    model: nn.Module,
    server: ParameterServer | ServerProcess,
    *,
    worker: int = 0,
    timeout_s: float = 30,
) -> ParameterServerOptimizer:
    return ParameterServerOptimizer(
        model.named_parameters(),
        str(server.address),
        q=0.8,
        worker=f"w{worker}",
        timeout_s=timeout_s,
    )


def saved_and_read(optimizer: ParameterServerOptimizer) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


@pytest.mark.parametrize("model_first", [False, True])
def test_resumed_it_walks_the_same_path(tmp_path: Path, model_first: bool) -> None:
    with serving(tmp_path, ADAMW) as server:
        model = make_model()
        optimizer = connect(model, server)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for step in range(8):
            if step == 4:
                state, then = saved_and_read(optimizer), copy.deepcopy(model.state_dict())
                of_scheduler = scheduler.state_dict()
            optimizer.zero_grad()
            backward(model, [batch(0, step)])
            optimizer.step()
            scheduler.step()
        expected = values(model)
        again = make_model()
        resumed = connect(again, server)  # the first process is fenced off, as if killed
        scheduler = torch.optim.lr_scheduler.ExponentialLR(resumed, 0.9)
        if model_first:
            again.load_state_dict(then)
        resumed.load_state_dict(state)
        scheduler.load_state_dict(of_scheduler)
        again.load_state_dict(then)
        assert resumed.stats().steps == 4
        for step in range(4, 8):
            resumed.zero_grad()
            backward(again, [batch(0, step)])
            resumed.step()
            scheduler.step()
        assert torch.equal(values(again), expected)
        assert server.coordinator.status().point.version == 8
        with pytest.raises(FencedError, match="newer process"):
            optimizer.close()
        resumed.close()


@pytest.mark.parametrize("what", ["another gradient", "another model"])
def test_resumed_on_another_path_it_goes_on_from_the_servers(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tmp_path, SGD) as server:
        model = make_model()
        optimizer = connect(model, server)
        for step in range(4):
            if step == 2:
                state, then = optimizer.state_dict(), copy.deepcopy(model.state_dict())
            optimizer.zero_grad()
            backward(model, [batch(0, step)])
            optimizer.step()
        expected = values(model)
        again = make_model()
        with connect(again, server) as resumed:
            resumed.load_state_dict(state)
            if what == "another gradient":
                again.load_state_dict(then)
            backward(again, [batch(5, 5)])
            with caplog.at_level(logging.WARNING):
                resumed.step()
            warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
            assert len(warnings) == 1
            assert "going on from version 4" in warnings[0].getMessage()
            assert torch.equal(values(again), expected)
            resumed.zero_grad()
            backward(again, [batch(0, 9)])
            resumed.step()
            assert not torch.equal(values(again), expected)


def test_another_model_is_noticed_also_where_the_first_step_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def lost(_: ServerClient) -> None:
        raise ServerLostError("no answer")

    with serving(tmp_path, SGD) as server:
        model = make_model()
        with connect(model, server) as optimizer:
            backward(model, [batch(0, 0)])
            optimizer.step()
            state = saved_and_read(optimizer)
        other = make_model()
        with connect(other, server) as resumed:
            resumed.load_state_dict(state)
            with torch.no_grad():
                next(other.parameters()).add_(1.0)
            backward(other, [batch(0, 1)])
            with monkeypatch.context() as patch:
                patch.setattr(ServerClient, "resync", lost)
                with pytest.raises(ServerLostError):
                    resumed.step()
            with caplog.at_level(logging.WARNING):
                resumed.step()
            assert "the parameters are not those that were saved" in caplog.text
            central = resumed.fetch_central()
            assert all(torch.equal(one, central[name]) for name, one in other.named_parameters())


def test_states_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "1", SGD) as one,
        serving(tmp_path / "2", SGD) as two,
        connect(make_model(), one) as optimizer,
        connect(make_model(), one, worker=1) as other,
        connect(make_model(), two) as elsewhere,
    ):
        state = optimizer.state_dict()
        with pytest.raises(ValueError, match=r"worker 'w0': expected 'w1', so pass worker='w0'"):
            other.load_state_dict(state)
        with pytest.raises(WrongRunError, match="the state belongs to run"):
            elsewhere.load_state_dict(state)
        with pytest.raises(ValueError, match="lacks 'topq'"):
            optimizer.load_state_dict({"state": {}, "param_groups": []})
        broken = copy.deepcopy(state)
        broken["topq"]["servers"][0]["residuals"] = {"0.bias": torch.zeros(3)}
        with pytest.raises(ValueError, match=r"residual of '0.bias' has shape \(3,\)"):
            optimizer.load_state_dict(broken)
        broken["topq"]["servers"][0].update(residuals={}, pushes={"next_sequence": 0})
        with pytest.raises(ValueError, match="no pushes of a worker"):
            optimizer.load_state_dict(broken)
        optimizer.load_state_dict(state)


def test_a_step_that_was_not_over_is_saved_as_such(tmp_path: Path) -> None:
    with serving(tmp_path / "1", ADAMW) as server:
        expected = trained(connect_and_keep(server), range(4))
    with ServerProcess(tmp_path / "2", ADAMW) as process:
        model, optimizer = connect_and_keep(process, timeout_s=1)
        trained((model, optimizer), range(2))
        process.kill()
        optimizer.zero_grad()
        backward(model, [batch(0, 2)])
        with pytest.raises(ServerLostError):
            optimizer.step()
        state, then = saved_and_read(optimizer), copy.deepcopy(model.state_dict())
        with pytest.raises(ServerLostError):
            optimizer.close()
        process.start()
        model, optimizer = connect_and_keep(process)
        optimizer.load_state_dict(state)
        model.load_state_dict(then)
        optimizer.step()
        assert torch.equal(trained((model, optimizer), range(3, 4)), expected)


Pair = tuple[nn.Module, ParameterServerOptimizer]


def connect_and_keep(server: ParameterServer | ServerProcess, **knobs: Any) -> Pair:
    model = make_model()
    return model, connect(model, server, **knobs)


def trained(pair: Pair, steps: range) -> Tensor:
    model, optimizer = pair
    for step in steps:
        optimizer.zero_grad()
        backward(model, [batch(0, step)])
        optimizer.step()
    return values(model)


def test_an_lr_that_is_a_tensor_is_saved_and_read(tmp_path: Path) -> None:
    with serving(tmp_path, SGD) as server:
        model, optimizer = connect_and_keep(server)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
        trained((model, optimizer), range(2))
        optimizer.load_state_dict(saved_and_read(optimizer))
        trained((model, optimizer), range(2, 3))
        assert server.coordinator._started().central.groups()[0].numbers["lr"] == 0.25
        optimizer.close()


def test_an_lr_that_others_drive_is_not_taken_for_a_change_after_a_resume() -> None:
    before = ServerGroups([[GroupView(names=("w",), numbers={"lr": 0.1})]])
    now = ServerGroups([[GroupView(names=("w",), numbers={"lr": 0.05})]])
    now.told_lr = before.told_lr
    assert now.rates([{"lr": 0.1}]) == [()]
    assert now.rates([{"lr": 0.2}]) == [(0.2,)]
    assert now.rates([{"lr": 0.1}]) == [(0.1,)]

"""ParameterServerOptimizer: the numbers of one process, and the manners of a torch optimizer."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from ps.certificates import Authority
from ps.servers import Options, serving
from ps.workers import backward, batch, make_model, side_by_side, values
from torch import Tensor, nn

import topq_dist.ps
from topq_dist.ps import ParameterServerOptimizer
from topq_dist.ps.protocol.errors import (
    InvalidError,
    ModelDiffersError,
    NonFiniteError,
    ServerLostError,
    UnauthenticatedError,
    WrongTokenError,
)
from topq_dist.ps.security.policy import ServerSecurity
from topq_dist.ps.security.tls import ClientTls, ServerTls
from topq_dist.ps.server.process import ParameterServer

SGD: Options = {"inner_opt": "sgd", "options": {"lr": 0.1, "momentum": 0.9}}
ADAMW: Options = {"inner_opt": "adamw", "options": {"lr": 0.01, "weight_decay": 0.1}}
PLAIN: Options = {"inner_opt": "sgd", "options": {"lr": 0.1}}


def connect(
    model: nn.Module, *servers: ParameterServer, worker: int = 0, **knobs: Any
) -> ParameterServerOptimizer:
    exact = {"q": 0.0, "value_format": None, "bound": None}
    knobs = {**exact, "timeout_s": 30, "worker": f"w{worker}", **knobs}
    addresses = [str(server.address) for server in servers]
    return ParameterServerOptimizer(model.named_parameters(), addresses, **knobs)


def steps_alone(inner: type[torch.optim.Optimizer], options: Options, steps: int) -> Tensor:
    """Return what one process holds that trains on the batches of three workers, joined."""
    model = make_model()
    optimizer = inner(model.parameters(), **options)
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, [batch(worker, step) for worker in range(3)])
        optimizer.step()
    return values(model)


def gradient_of(model: nn.Module, name: str) -> Tensor:
    gradient = model.get_parameter(name).grad
    assert gradient is not None
    return gradient


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("training", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_three_workers_equal_one_process_on_the_joined_batch(
    tmp_path: Path, training: Options, servers: int
) -> None:
    inner = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[training["inner_opt"]]
    with (
        serving(tmp_path / "1", training, start_workers=3) as one,
        serving(tmp_path / "2", training, start_workers=3) as two,
    ):

        def work(worker: int) -> Tensor:
            model = make_model()
            with connect(model, *[one, two][:servers], worker=worker) as optimizer:
                for step in range(50):
                    optimizer.zero_grad()
                    backward(model, [batch(worker, step)])
                    optimizer.step()
                stats = optimizer.stats()
            assert stats.steps == 50
            assert stats.sent_bytes > stats.dense_bytes == 50 * 4 * values(model).numel()
            return values(model)

        first, *others = side_by_side(3, work)
    assert all(torch.equal(first, other) for other in others)
    expected = steps_alone(inner, training["options"], 50)
    assert float((first - expected).norm() / expected.norm()) < 1e-6


def test_a_learning_rate_scheduler_drives_the_server(tmp_path: Path) -> None:
    alone, model = make_model(), make_model()
    reference = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    with serving(tmp_path, SGD) as server, connect(model, server) as optimizer:
        schedulers = [
            torch.optim.lr_scheduler.StepLR(each, step_size=3, gamma=0.3)
            for each in (reference, optimizer)
        ]
        for step in range(9):
            for one, each in ((alone, reference), (model, optimizer)):
                each.zero_grad()
                backward(one, [batch(0, step)])
                each.step()
            for scheduler in schedulers:
                scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.3**3)
        torch.testing.assert_close(values(model), values(alone))


def test_gradients_accumulate_and_closures_are_called(tmp_path: Path) -> None:
    alone, model = make_model(), make_model()
    reference = torch.optim.SGD(alone.parameters(), lr=0.1)
    with serving(tmp_path, PLAIN) as server, connect(model, server) as optimizer:
        for one, each in ((alone, reference), (model, optimizer)):
            backward(one, [batch(0, 0)])
            backward(one, [batch(0, 1)])
            each.step()

            def closure(one: nn.Module = one, each: torch.optim.Optimizer = each) -> Tensor:
                each.zero_grad()
                return backward(one, [batch(0, 2)])

            loss = each.step(closure)
            assert float(loss) > 0
        torch.testing.assert_close(values(model), values(alone))
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in model.parameters())


def test_no_gradient_counts_as_zeros_and_frozen_parameters_stay_out(tmp_path: Path) -> None:
    model = make_model()
    model[0].bias.requires_grad_(False)
    before = values(model)
    with serving(tmp_path, PLAIN) as server, connect(model, server) as optimizer:
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 3
        optimizer.step()
        assert torch.equal(values(model), before)
        model[2].bias.grad = torch.ones(4)
        optimizer.step()
    moved = values(model) - before
    assert moved[:-4].count_nonzero() == 0
    torch.testing.assert_close(moved[-4:], torch.full((4,), -0.1))


def test_groups_are_the_servers(tmp_path: Path) -> None:
    model = make_model()
    with serving(tmp_path, SGD) as server, connect(model, server) as optimizer:
        assert optimizer.param_groups[0]["momentum"] == 0.9
        with pytest.raises(RuntimeError, match="the servers hold the groups"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
        optimizer.param_groups[0]["dampening"] = 0.5
        with pytest.raises(ValueError, match=r"dampening=0.5 in param_groups\[0\]: expected 0.0"):
            optimizer.step()
        optimizer.param_groups[0].update(dampening=0.0, lr=float("nan"))
        with pytest.raises(ValueError, match="lr=nan"):
            optimizer.step()
        for copier in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied or pickled"):
                copier(optimizer)


def test_a_gradient_that_is_not_finite_is_named_and_not_sent(tmp_path: Path) -> None:
    model = make_model()
    with serving(tmp_path, SGD) as server, connect(model, server, q=0.5) as optimizer:
        backward(model, [batch(0, 0)])
        residuals = optimizer.state_dict()["topq"]["servers"][0]["residuals"]
        gradient_of(model, "2.weight")[1, 1] = torch.inf
        with pytest.raises(NonFiniteError, match=r"the gradient of '2\.weight'"):
            optimizer.step()
        assert server.coordinator.status().received_bytes == 0
        assert optimizer.state_dict()["topq"]["servers"][0]["residuals"].keys() >= residuals.keys()
        optimizer.zero_grad()
        backward(model, [batch(0, 0)])
        optimizer.step()
        assert server.coordinator.status().point.version == 1


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_grad_scaler_skips_the_worker_and_not_the_round(tmp_path: Path, unscaled: bool) -> None:
    """Of two workers one overflows in step 1: that version is the other's gradient alone."""
    with serving(tmp_path, PLAIN, start_workers=2) as server:

        def work(worker: int) -> Tensor:
            model = make_model()
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            with connect(model, server, worker=worker) as optimizer:
                for step in range(3):
                    optimizer.zero_grad()
                    inputs, targets = batch(worker, step)
                    scaled = scaler.scale(nn.functional.mse_loss(model(inputs), targets))
                    torch.autograd.backward(scaled)
                    if worker == 0 and step == 1:
                        gradient_of(model, "0.bias")[0] = torch.inf
                    if unscaled:
                        scaler.unscale_(optimizer)
                    scaler.step(optimizer)
                    scaler.update()
            assert scaler.get_scale() == (2.0 if worker == 0 else 4.0)
            return values(model)

        first, second = side_by_side(2, work)
        assert server.coordinator.status().point.version == 3
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, [batch(worker, step) for worker in ((1,) if step == 1 else (0, 1))])
        optimizer.step()
    assert torch.equal(first, second)
    torch.testing.assert_close(first, values(model))


def test_central_parameters_with_a_sparse_downlink(tmp_path: Path) -> None:
    training = {**SGD, "downlink": "topq", "q": 0.9}
    model = make_model()
    with serving(tmp_path, training) as server, connect(model, server) as optimizer:
        backward(model, [batch(0, 0)])
        optimizer.step()
        held = values(model)
        central = optimizer.fetch_central()
        with optimizer.central():
            inside = values(model)
        assert list(central) == [name for name, _ in model.named_parameters()]
        assert torch.equal(inside, torch.cat([each.flatten() for each in central.values()]))
        assert not torch.equal(inside, held)
        assert torch.equal(values(model), held)
    alone = make_model()
    reference = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    backward(alone, [batch(0, 0)])
    reference.step()
    torch.testing.assert_close(inside, values(alone))


def test_over_tls_with_a_token(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue("server", server=True)
    tokens = tmp_path / "tokens"
    tokens.write_text(f"w0 {'a' * 32}\nw1 {'b' * 32}\n")
    tokens.chmod(0o600)
    security = ServerSecurity(
        tls=ServerTls(certificate=pair.certificate, key=pair.key), tokens=tokens
    )
    tls = ClientTls(ca=authority.certificate)
    with serving(tmp_path / "state", PLAIN, security=security) as server:
        model = make_model()
        with connect(model, server, tls=tls, token="a" * 32) as optimizer:
            backward(model, [batch(0, 0)])
            optimizer.step()
        with pytest.raises(WrongTokenError, match=rf"{server.address}.*worker='w1'"):
            connect(model, server, worker=1, tls=tls, token="a" * 32)
        with pytest.raises(UnauthenticatedError, match="no token"):
            connect(model, server, tls=tls)
        with pytest.raises(ServerLostError, match="the server speaks TLS"):
            connect(model, server, timeout_s=0.5)


def test_another_model_is_refused_by_its_first_difference(tmp_path: Path) -> None:
    with serving(tmp_path, SGD) as server, connect(make_model(), server):
        model = make_model()
        model[2] = nn.Linear(16, 5)
        with pytest.raises(ModelDiffersError, match=r"'2\.weight' has shape \(5, 16\) here"):
            connect(model, server, worker=1)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"q": 1.5}, "q=1.5"),
        ({"worker": "a b"}, "worker='a b'"),
        ({"timeout_s": 0}, "timeout_s=0"),
        ({"scope": "layer"}, "scope='layer'"),
        ({"value_format": "fp8"}, "fp8"),
        ({"bound": 0.0}, "bound=0.0"),
        ({"bound": 2.0, "error_feedback": False}, "bound=2.0 with error_feedback=False"),
        ({"servers": []}, "servers is empty"),
        ({"servers": "nowhere"}, "nowhere"),
        ({"named_parameters": []}, "no trainable parameter"),
        ({"token": "short"}, "token"),
    ],
)
def test_bad_knobs_are_named(knobs: Options, message: str) -> None:
    arguments = {
        "named_parameters": make_model().named_parameters(),
        "servers": "127.0.0.1:1",
        **knobs,
    }
    with pytest.raises(ValueError, match=message):
        ParameterServerOptimizer(**arguments)
    with pytest.raises(TypeError, match="expected pairs of a name and a tensor"):
        ParameterServerOptimizer(make_model().parameters(), "127.0.0.1:1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="servers=5: expected HOST:PORT"):
        ParameterServerOptimizer(make_model().named_parameters(), 5)  # type: ignore[arg-type]


def test_what_is_clipped_arrives_later(tmp_path: Path) -> None:
    with serving(tmp_path, {"inner_opt": "sgd", "options": {"lr": 1.0}}) as server:
        model = nn.Linear(5, 1, bias=False)
        nn.init.zeros_(model.weight)
        with connect(model, server, q=0.6, bound=1.0) as optimizer:
            model.weight.grad = torch.tensor([[2.0, -6.0, 1.0, 0.5, 0.0]])
            optimizer.step()
            assert model.weight.tolist() == [[-2.0, 4.0, 0.0, 0.0, 0.0]]
            model.weight.grad.zero_()
            optimizer.step()
            # -2 and 1 of what was left, to their mean magnitude
            assert model.weight.tolist() == [[-2.0, 5.5, -1.0, 0.0, 0.0]]


def test_a_model_that_the_servers_options_do_not_go_with_is_refused(tmp_path: Path) -> None:
    training: Options = {"inner_opt": "sgd", "options": {"lr": 0.1, "fused": True}}
    with serving(tmp_path, training) as server:
        with pytest.raises(InvalidError, match=r"cannot train this model.*half precision"):
            connect(make_model().half(), server)
        assert server.coordinator.status().refused == {"invalid": 1}
        connect(make_model(), server).close()


def test_to_close_again_does_nothing(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "1", PLAIN) as one,
        serving(tmp_path / "2", PLAIN) as two,
        connect(make_model(), one, two) as optimizer,
    ):
        optimizer.close()
        optimizer.close()
        with pytest.raises(RuntimeError, match="is closed"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="is closed"):
            optimizer.fetch_central()


def test_it_is_where_users_look_for_it() -> None:
    assert topq_dist.ps.ParameterServerOptimizer is ParameterServerOptimizer
    with pytest.raises(AttributeError, match="no attribute 'Optimizer'"):
        topq_dist.ps.Optimizer  # noqa: B018

"""Local steps through a server: an optimizer of the worker's own, and the servers' as outer one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ps.servers import Options, serving
from ps.workers import backward, batch, make_model, side_by_side, values
from server_process import ServerProcess
from torch import Tensor, nn

from topq_dist.ps import ParameterServerOptimizer
from topq_dist.ps.client.local_steps import LocalSteps
from topq_dist.ps.client.probe import ask_status
from topq_dist.ps.protocol.errors import NonFiniteError
from topq_dist.ps.security.policy import ClientSecurity

AVERAGE: Options = {"inner_opt": "sgd", "options": {"lr": 1.0}}
NESTEROV: Options = {
    "inner_opt": "sgd",
    "options": {"lr": 0.7, "momentum": 0.9, "nesterov": True},
    "momentum": "optimizer",
}
EVERY, STEPS = 3, 12


def own(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def connect(model: nn.Module, address: str, worker: int, **knobs: Any) -> ParameterServerOptimizer:
    usual: dict[str, Any] = {
        "q": 0.7,
        "every": EVERY,
        "local_optimizer": own(model),
        "residual_decay": 0.95,
    }
    return ParameterServerOptimizer(
        model.named_parameters(), address, worker=f"w{worker}", timeout_s=60, **(usual | knobs)
    )


def train(
    model: nn.Module, optimizer: ParameterServerOptimizer, worker: int, first: int, last: int
) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        backward(model, [batch(worker, step)])
        optimizer.step()


def sha256(address: str) -> str:
    status = ask_status(address, ClientSecurity(), timeout_s=30, state_sha256=True)
    return str(status.state_sha256)


@pytest.mark.parametrize("workers", [2, 4])
def test_everything_at_rate_one_is_the_average_of_the_parameters(
    tmp_path: Path, workers: int
) -> None:
    with serving(tmp_path, AVERAGE, start_workers=workers) as server:

        def work(worker: int) -> Tensor:
            model = make_model()
            exact = {"q": 0.0, "bound": None, "residual_decay": 1.0}
            with connect(model, str(server.address), worker, **exact) as optimizer:
                train(model, optimizer, worker, 0, STEPS)
                stats = optimizer.stats()
            assert stats.steps == STEPS
            assert stats.sent_bytes < 1.2 * stats.dense_bytes / EVERY
            return values(model)

        held = side_by_side(workers, work)
        assert server.coordinator.status().point.version == STEPS // EVERY
    models = [make_model() for _ in range(workers)]
    optimizers = [own(model) for model in models]
    for step in range(STEPS):
        for worker, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            backward(model, [batch(worker, step)])
            optimizer.step()
        if (step + 1) % EVERY == 0:
            with torch.no_grad():
                for same in zip(*(model.parameters() for model in models), strict=True):
                    mean = torch.stack(same).mean(0)
                    for parameter in same:
                        parameter.copy_(mean)
    for mine in held:
        assert torch.equal(mine, held[0])
        torch.testing.assert_close(mine, values(models[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("workers", [2, 4])
def test_a_server_that_is_killed_ends_in_the_same_bits(tmp_path: Path, workers: int) -> None:
    def run(name: str, *, kills: bool) -> tuple[str, list[Tensor]]:
        begun = threading.Barrier(workers + kills)
        serve = {"start_workers": workers, "snapshot_every": 2}
        with ServerProcess(tmp_path / name, NESTEROV, serve) as server:

            def work(worker: int) -> Tensor | None:
                if worker == workers:
                    for _ in range(2):
                        begun.wait(60)
                        server.kill()
                        server.start()
                    return None
                model = make_model()
                with connect(model, server.address, worker) as optimizer:
                    for step in range(STEPS):
                        if kills and step in (1, 5):
                            begun.wait(60)
                        train(model, optimizer, worker, step, step + 1)
                return values(model)

            held = side_by_side(workers + kills, work)
            return sha256(server.address), held[:workers]

    undisturbed, disturbed = run("once", kills=False), run("killed", kills=True)
    assert disturbed[0] == undisturbed[0]
    for mine, other in zip(disturbed[1], undisturbed[1], strict=True):
        assert torch.equal(mine, other)


def test_async_a_slow_worker_holds_nobody_up(tmp_path: Path) -> None:
    with serving(tmp_path, {**AVERAGE, "mode": "async"}, start_workers=2) as server:
        over = threading.Event()

        def work(worker: int) -> Tensor:
            model = make_model()
            with connect(model, str(server.address), worker) as optimizer:
                train(model, optimizer, worker, 0, 1)
                if worker == 1:
                    assert over.wait(60)
                train(model, optimizer, worker, 1, STEPS)
                over.set()
            return values(model)

        held = side_by_side(2, work)
        assert server.coordinator.status().point.version == 2 * STEPS // EVERY
    assert not torch.equal(held[0], values(make_model()))


def test_async_in_turns_a_killed_server_ends_in_the_same_bits(tmp_path: Path) -> None:
    def run(name: str, kill_at: int | None) -> tuple[str, list[Tensor]]:
        # of a killed server, who is not back yet is waited for so long
        serve = {"start_workers": 2, "snapshot_every": 1, "lease_s": 1.0}
        with ServerProcess(tmp_path / name, {**AVERAGE, "mode": "async"}, serve) as server:
            models = [make_model(), make_model()]
            optimizers = side_by_side(
                2, lambda worker: connect(models[worker], server.address, worker)
            )
            for step in range(STEPS):
                if step == kill_at:
                    server.kill()
                    server.start()
                for worker in range(2):
                    train(models[worker], optimizers[worker], worker, step, step + 1)
            held = [values(model) for model in models]
            found = sha256(server.address)
            for optimizer in optimizers:
                optimizer.close()
            return found, held

    undisturbed = run("once", None)
    for kill_at in (4, 6):
        disturbed = run(f"killed{kill_at}", kill_at)
        assert disturbed[0] == undisturbed[0]
        assert all(map(torch.equal, disturbed[1], undisturbed[1]))


@pytest.mark.parametrize("model_first", [False, True])
def test_saved_between_rounds_it_walks_the_same_path(tmp_path: Path, model_first: bool) -> None:
    with serving(tmp_path, AVERAGE) as server:
        model = make_model()
        optimizer = connect(model, str(server.address), 0)
        train(model, optimizer, 0, 0, 5)
        torch.save(optimizer.state_dict(), tmp_path / "worker.pt")
        then = copy.deepcopy(model.state_dict())
        train(model, optimizer, 0, 5, 10)
        again = make_model()
        resumed = connect(again, str(server.address), 0)
        state = torch.load(tmp_path / "worker.pt", weights_only=True)
        if model_first:
            again.load_state_dict(then)
        resumed.load_state_dict(state)
        again.load_state_dict(then)
        again_saved = resumed.state_dict()["topq"]["local"]
        assert all(
            torch.equal(again_saved["held"][n], t)
            for n, t in state["topq"]["local"]["held"].items()
        )
        train(again, resumed, 0, 5, 10)
        assert torch.equal(values(again), values(model))
        plain = ParameterServerOptimizer(
            make_model().named_parameters(), str(server.address), worker="w0"
        )
        with pytest.raises(ValueError, match="has a local optimizer: expected one without"):
            plain.load_state_dict(state)
        broken = copy.deepcopy(state)
        broken["topq"]["local"]["held"].popitem()
        with pytest.raises(ValueError, match="holds other parameters"):
            resumed.load_state_dict(broken)
        plain.close()


def test_between_rounds_the_servers_parameters_are_looked_at_and_nothing_is_lost(
    tmp_path: Path,
) -> None:
    with serving(tmp_path, AVERAGE) as server:
        model = make_model()
        with connect(model, str(server.address), 0) as optimizer:
            train(model, optimizer, 0, 0, 4)
            before = values(model)
            with optimizer.central():
                assert not torch.equal(values(model), before)
            assert torch.equal(values(model), before)
            optimizer.fetch_central()
            assert torch.equal(values(model), before)


def test_what_is_not_finite_is_not_sent_and_the_next_round_is_as_ever(tmp_path: Path) -> None:
    with serving(tmp_path, AVERAGE) as server:
        model = make_model()
        with connect(model, str(server.address), 0) as optimizer:
            train(model, optimizer, 0, 0, EVERY)
            held = values(model)
            train(model, optimizer, 0, EVERY, 2 * EVERY - 1)
            with torch.no_grad():
                next(model.parameters())[0, 0] = torch.nan
            optimizer.zero_grad()
            with pytest.raises(NonFiniteError, match=r"0\.weight.*those of the last round again"):
                optimizer.step()
            assert torch.equal(values(model), held)
            train(model, optimizer, 0, 6, 6 + EVERY - 1)
            assert server.coordinator.status().point.version == 1
            train(model, optimizer, 0, 8, 9)
            assert server.coordinator.status().point.version == 2
            assert bool(values(model).isfinite().all())


class DataSGD(torch.optim.Optimizer):
    """Steps as many optimizers do: autograd counts no writes to .data."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {"lr": 0.01})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.data.add_(parameter.grad, alpha=-self.param_groups[0]["lr"])


def test_steps_that_autograd_does_not_count_are_sent_once(tmp_path: Path) -> None:
    found: list[Tensor] = []
    for kind in (DataSGD, partial(torch.optim.SGD, lr=0.01)):
        with serving(tmp_path / f"{len(found)}", AVERAGE) as server:
            model = make_model()
            inner = kind(model.parameters())
            with connect(model, str(server.address), 0, local_optimizer=inner) as optimizer:
                train(model, optimizer, 0, 0, 4 * EVERY)
            found.append(values(model))
    assert torch.equal(*found)


def test_a_state_that_the_local_optimizer_refuses_changes_nothing(tmp_path: Path) -> None:
    def flat(state: Any) -> Any:
        if isinstance(state, Tensor):
            return state.tolist()
        if isinstance(state, Mapping):
            return {key: flat(one) for key, one in state.items()}
        return list(map(flat, state)) if isinstance(state, list | tuple) else state

    with serving(tmp_path, AVERAGE) as server:
        model = make_model()
        with connect(model, str(server.address), 0) as optimizer:
            train(model, optimizer, 0, 0, 4)
            state = copy.deepcopy(optimizer.state_dict())
            train(model, optimizer, 0, 4, 8)
            before = flat(optimizer.state_dict())
            broken: list[Any] = [
                torch.optim.SGD(model[0].parameters(), lr=0.1).state_dict(),
                {**state["topq"]["local"]["optimizer"], "state": {0: "nothing of the kind"}},
                {},
            ]
            for inner in broken:
                other = copy.deepcopy(state)
                other["topq"]["local"]["optimizer"] = inner
                with pytest.raises(ValueError, match="does not fit the local optimizer"):
                    optimizer.load_state_dict(other)
                assert flat(optimizer.state_dict()) == before
            state["param_groups"][0]["params"].pop()
            with pytest.raises(ValueError, match=r"param_groups has \[3\] parameters: expected"):
                optimizer.load_state_dict(state)
            assert flat(optimizer.state_dict()) == before
            train(model, optimizer, 0, 8, 10)


def test_a_loss_scale_is_taken_off_and_overflow_steps_nothing(tmp_path: Path) -> None:
    results = []
    for scale in (1.0, 256.0):
        with serving(tmp_path / f"{scale:g}", AVERAGE) as server:
            model = make_model()
            with connect(model, str(server.address), 0) as optimizer:
                scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
                for step in range(2 * EVERY):
                    optimizer.zero_grad()
                    inputs, targets = batch(0, step)
                    loss = nn.functional.mse_loss(model(inputs), targets)
                    torch.autograd.backward(scaler.scale(loss))
                    scaler.step(optimizer)
                    scaler.update()
                results.append(values(model))
                before = values(model)
                if scale > 1:
                    gradient = torch.full_like(next(model.parameters()), torch.inf)
                    for parameter in model.parameters():
                        parameter.grad = torch.zeros_like(parameter)
                    next(model.parameters()).grad = gradient
                    scaler.step(optimizer)
                    assert torch.equal(values(model), before)
            assert server.coordinator.status().point.version == 2
    assert torch.equal(*results)


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    model = make_model()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"every": 0}, "every=0: expected"),
        ({"every": 2.0}, "every=2.0: expected an integer"),
        ({"local_optimizer": None}, "every=3 without local_optimizer"),
        ({"local_optimizer": "adamw"}, "local_optimizer is a str"),
        ({"local_optimizer": own(make_model())}, "local_optimizer has parameters of shapes"),
        ({"residual_decay": 2.0}, "residual_decay=2.0"),
        ({"error_feedback": False, "bound": None}, "residual_decay=0.95 with error_feedback=False"),
    ]
    for options, words in cases:
        with pytest.raises((TypeError, ValueError), match=words):
            connect(model, "127.0.0.1:1", 0, **options)


def test_a_step_that_raises_is_not_counted_and_divides_once() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    local = LocalSteps(torch.optim.SGD([parameter], lr=1.0), 2, [parameter])
    parameter.grad = torch.full((2,), 8.0)

    def out_of_memory() -> float:
        raise RuntimeError("out of memory")

    for _ in range(3):
        with pytest.raises(RuntimeError, match="out of memory"):
            local.step(out_of_memory, scale=2.0)
    assert not local.due
    local.step(None, scale=2.0)
    assert parameter.tolist() == [-4.0, -4.0]
    # overflow counts, or this worker's rounds would be others
    local.step(None, scale=2.0, overflow=True)
    assert local.due

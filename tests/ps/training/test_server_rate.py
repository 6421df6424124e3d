"""The server's rate follows the coherence of pushes, on inner optimizers of Adam's kind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ps.servers import Options, serving
from ps.training.test_central import SINGLE, push_of, random_gradients, random_model, same_bits
from ps.workers import backward, batch, make_model, side_by_side, values
from server_process import ServerProcess
from torch import Tensor

from topq_dist.compress.coherence import Coherence, CoherenceMean
from topq_dist.ps import ParameterServerOptimizer
from topq_dist.ps.client.replay_log import ReplayLog
from topq_dist.ps.protocol.config import ConfigError, TrainingConfig
from topq_dist.ps.protocol.errors import InvalidError, NonFiniteError
from topq_dist.ps.protocol.types import START, NewPush, Push, push_digest
from topq_dist.ps.training.central import CentralModel

ADAMW: Options = {"inner_opt": "adamw", "options": {"lr": 0.01, "weight_decay": 0.1}}
Q, DENSITY = 0.9, 0.1


def central_of(**training: Any) -> CentralModel:
    model = random_model(SINGLE)
    return CentralModel(TrainingConfig(**ADAMW | training), model.spec, model)


def pushes(seed: int, *coherences: tuple[float, ...]) -> list[Push]:
    generator, model = torch.Generator().manual_seed(seed), random_model(SINGLE)
    return [
        replace(push_of(model, random_gradients(model, generator), q=Q), coherence=coherence)
        for coherence in coherences
    ]


def parameters(central: CentralModel) -> list[Tensor]:
    return [flat.clone() for flat in central._params.flats]


def test_a_sparse_step_is_torchs_at_the_rate_that_the_sum_of_all_pushes_says() -> None:
    agreeing, plain = central_of(), central_of(adapt_rate=False)
    agreeing.apply(pushes(0, (3.0, 1.0), (1.0, 1.0)))
    mean = CoherenceMean()
    mean.add(Coherence(4.0, 2.0))
    factor = mean.rate_factor(DENSITY)
    assert factor > 1.5
    (group,) = plain._inner.param_groups
    # decoupled weight decay is not to go with the rate
    group["lr"], group["weight_decay"] = 0.01 * factor, 0.1 / factor
    plain.apply(pushes(0, (3.0, 1.0), (1.0, 1.0)))
    assert all(map(same_bits, parameters(agreeing), parameters(plain)))
    (group,) = agreeing._inner.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.01, 0.1)


@pytest.mark.parametrize(
    "training",
    [
        {"adapt_rate": False},
        {"momentum": "optimizer"},
        {"inner_opt": "sgd", "options": {"lr": 0.01, "momentum": 0.9}},
    ],
)
def test_elsewhere_coherence_changes_nothing(training: Options) -> None:
    told, untold = central_of(**training), central_of(**training)
    assert not any(group.takes_coherence for group in told.groups())
    told.apply(pushes(0, (3.0, 1.0)))
    untold.apply(pushes(0, ()))
    assert told.sha256() == untold.sha256()


def test_what_a_snapshot_holds_goes_on_in_the_same_bits() -> None:
    central = central_of()
    assert all(group.takes_coherence for group in central.groups())
    for step in range(3):
        central.apply(pushes(step, (3.0, 1.0)))
    tensors, metadata = central.state()
    other = central_of()
    other.load_state(tensors, json.loads(json.dumps(metadata)))
    for one in (central, other):
        one.apply(pushes(9, (1.0, 1.0)))
    assert other.sha256() == central.sha256()
    for wrong in ([1.0], [1.0, -1.0], "much", [1.0, float("nan")]):
        with pytest.raises(ValueError, match="coherence"):
            other.load_state(tensors, {**metadata, "coherence": wrong})
    assert other.sha256() == central.sha256()


def test_what_is_no_coherence_is_refused() -> None:
    central = central_of()
    for wrong, error, said in (
        ((1.0,), InvalidError, "1 sums of coherence"),
        ((1.0, 2.0, 3.0), InvalidError, "3 sums of coherence"),
        ((1.0, float("nan")), NonFiniteError, "coherence="),
        ((float("inf"), 1.0), NonFiniteError, "coherence="),
        ((1.0, -1.0), InvalidError, "0 or more"),
    ):
        (push,) = pushes(0, wrong)
        with pytest.raises(error, match=said):
            central.check_push(push)


def test_one_worker_cannot_raise_the_rate_past_that_of_dense_gradients() -> None:
    central = central_of()
    central.apply(pushes(0, (1e300, 1e-300)))
    with central._momentum.stepping([push.frames for push in pushes(0, ())]):
        (group,) = central._inner.param_groups
        assert group["lr"] <= 0.01 / DENSITY**0.5 * (1 + 1e-9)


def test_in_async_mode_ever_larger_claims_raise_the_rate_no_further() -> None:
    """Such claims let the mean grow, until the others' were nothing beside it."""
    central = central_of(mode="async")
    for claimed in np.logspace(0, 300, 60):
        for coherence in ((-0.1, 1.0), (-0.1, 1.0), (float(claimed), 1.0)):
            central.apply(pushes(0, coherence))
    aligned, energy = central._momentum._coherence.sums
    assert energy > 0.5 * aligned


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_one_worker_does_not_rule_the_mean_for_long(mode: str) -> None:
    """Without a bound its one push counted more than thousands of the others' after it."""
    spoilt, plain = central_of(mode=mode), central_of(mode=mode)
    for step in range(60):
        for central in (spoilt, plain):
            usual = pushes(step, (0.5, 1.0), (0.5, 1.0))
            if step == 10 and central is spoilt:
                usual[0] = replace(usual[0], coherence=(1e300, 1e300))
            for version in (usual,) if mode == "sync" else ([one] for one in usual):
                central.apply(version)
    rates = []
    for central in (spoilt, plain):
        aligned, energy = central._momentum._coherence.sums
        rates.append(aligned / energy)
    assert rates[0] == pytest.approx(rates[1], rel=0.05)


def test_kept_pushes_go_round_with_their_coherence() -> None:
    log = ReplayLog()
    made = log.begin(
        START, NewPush(frames=(memoryview(b"frame"),), lr=(0.1,), coherence=(2.0, 1.0))
    )
    state = log.state_dict()
    again = ReplayLog.from_state(state).pending
    assert again is not None
    assert (again.coherence, again.digest) == (made.coherence, made.digest)
    assert made.digest != push_digest((0.1,), [memoryview(b"frame")])
    del state["pending"]["coherence"]
    old = ReplayLog.from_state(state).pending
    assert old is not None
    assert old.digest == push_digest((0.1,), [memoryview(b"frame")])


def test_the_option_is_checked_and_refused_where_it_has_no_effect() -> None:
    with pytest.raises(ConfigError, match="adapt_rate=1: expected True or False"):
        central_of(adapt_rate=1)
    with pytest.raises(ConfigError, match="adapt_rate=True: no effect with momentum='optimizer'"):
        central_of(adapt_rate=True, momentum="optimizer")
    central_of(adapt_rate=False, momentum="optimizer")


def test_a_rate_that_nothing_would_adapt_is_not_asked_for(tmp_path: Path) -> None:
    sgd = {"inner_opt": "sgd", "options": {"lr": 0.1}}
    expected = "adapt_rate=True: no effect with inner_opt='sgd', expected one of Adam's kind"
    with (
        pytest.raises(ConfigError, match=expected),
        serving(tmp_path / "sgd", {**sgd, "adapt_rate": True}),
    ):
        raise AssertionError("it started")
    with serving(tmp_path / "sgd", sgd) as server:
        assert server.coordinator.training.adapt_rate  # as any new run has it


def train(address: object, between: Any = lambda worker, step: None) -> list[Tensor]:
    """Return what two workers hold that see the same batch over and over."""

    def work(worker: int) -> Tensor:
        model = make_model()
        with ParameterServerOptimizer(
            model.named_parameters(), str(address), q=Q, worker=f"w{worker}", timeout_s=40
        ) as optimizer:
            for step in range(8):
                optimizer.zero_grad()
                backward(model, [batch(worker, 0)])
                between(worker, step)
                optimizer.step()
        return values(model)

    return side_by_side(2, work)


def test_workers_measure_it_and_a_killed_server_ends_in_the_same_bits(tmp_path: Path) -> None:
    options: Options = {"start_workers": 2, "snapshot_every": 3}
    with serving(tmp_path / "plain", {**ADAMW, "adapt_rate": False}, **options) as server:
        plain, _ = train(server.address)
    with serving(tmp_path / "undisturbed", ADAMW, **options) as server:
        expected, _ = train(server.address)
        sha256 = server.coordinator.status(state_sha256=True).state_sha256
    assert not torch.equal(expected, plain)
    with ServerProcess(tmp_path / "killed", ADAMW, options) as process:

        def between(worker: int, step: int) -> None:
            if worker == 0 and step in (2, 5):
                process.kill()
                process.start()

        for held in train(process.address, between):
            assert torch.equal(held, expected)
        process.terminate()
    with serving(tmp_path / "killed", ADAMW, **options) as server:
        assert server.coordinator.status(state_sha256=True).state_sha256 == sha256

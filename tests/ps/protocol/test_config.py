"""The configuration of a server is checked when it is made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from topq_dist.ps.protocol.config import (
    ConfigError,
    Downlink,
    Mode,
    ServingConfig,
    TrainingConfig,
    check_together,
)
from topq_dist.ps.server.coordinator import Coordinator
from topq_dist.ps.state.state_dir import StateDir


@pytest.mark.parametrize(
    "name",
    ["start_workers", "min_workers", "max_workers", "snapshot_every", "max_model_bytes"],
)
@pytest.mark.parametrize("value", [0, 1.5, True, float("nan")])
def test_counts_are_whole_and_above_zero(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}=.*: expected a whole number of at least 1"):
        ServingConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-1, 0.5])
def test_staleness_and_history_are_whole_and_may_be_zero(value: float) -> None:
    with pytest.raises(ValueError, match=r"max_staleness=.*: expected a whole number"):
        TrainingConfig(inner_opt="sgd", max_staleness=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"history_bytes=.*: expected a whole number"):
        ServingConfig(history_bytes=value)  # type: ignore[arg-type]
    config = TrainingConfig(inner_opt="sgd", mode="async", max_staleness=0)
    assert config.max_staleness == 0


def test_momentum_is_one_of_two_and_what_the_run_began_with_where_left_open() -> None:
    with pytest.raises(ValueError, match="momentum='never': expected one of feedback, optimizer"):
        TrainingConfig(inner_opt="sgd", momentum="never")  # type: ignore[arg-type]
    left_open = TrainingConfig(inner_opt="sgd")
    assert left_open.begun().momentum == "feedback"
    assert left_open.begun({}).momentum == "optimizer"  # nobody could say it then
    assert left_open.begun({"momentum": "feedback"}).momentum == "feedback"
    given = TrainingConfig(inner_opt="sgd", momentum="optimizer")
    assert given.begun() is given.begun({"momentum": "feedback"}) is given


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), "60"])
def test_times_are_finite_and_above_zero(value: float) -> None:
    with pytest.raises(ValueError, match=r"lease_s=.*: expected a number above 0"):
        ServingConfig(lease_s=value)
    with pytest.raises(ValueError, match=r"round_timeout_s=.*: expected a number above 0"):
        ServingConfig(round_timeout_s=value)


@pytest.mark.parametrize(
    ("mode", "downlink", "name", "value", "switch"),
    [
        ("sync", "exact", "max_staleness", 4, "mode='sync', expected mode='async'"),
        ("sync", "exact", "q", 0.5, "downlink='exact', expected downlink='topq'"),
        ("sync", "dense", "value_format", "fp8", "downlink='dense', expected downlink='topq'"),
    ],
)
def test_what_has_no_effect_is_refused(
    mode: Mode, downlink: Downlink, name: str, value: object, switch: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}: no effect with {switch}")):
        TrainingConfig(inner_opt="sgd", mode=mode, downlink=downlink, **{name: value})  # type: ignore[arg-type]
    config = TrainingConfig(inner_opt="sgd", mode="async", downlink="topq", **{name: value})  # type: ignore[arg-type]
    assert getattr(config, name) == value


def test_a_rounds_time_and_its_least_workers_are_refused_where_there_are_no_rounds(
    tmp_path: Path,
) -> None:
    training = TrainingConfig(inner_opt="sgd", mode="async")
    expected = r"round_timeout_s=2\.0: no effect with mode='async', expected mode='sync'"
    with pytest.raises(ValueError, match=expected), StateDir(tmp_path) as folder:
        Coordinator(training, ServingConfig(round_timeout_s=2.0), folder)
    expected = r"min_workers=2: no effect with mode='async', expected mode='sync'"
    with pytest.raises(ValueError, match=expected):
        check_together(training, ServingConfig(min_workers=2))
    check_together(training, ServingConfig(start_workers=2))
    check_together(TrainingConfig(inner_opt="sgd"), ServingConfig(round_timeout_s=2.0))


def test_an_error_names_its_field_for_programs_too() -> None:
    for options in ({"mode": "often"}, {"downlink": "topq", "q": 2.0}, {"max_staleness": 4}):
        with pytest.raises(ConfigError) as caught:
            TrainingConfig(inner_opt="sgd", **options)
        assert caught.value.field == list(options)[-1]
        assert str(caught.value).startswith(f"{caught.value.field}=")

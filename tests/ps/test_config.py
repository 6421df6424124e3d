"""What a server is told at its start is checked when it is said."""

from __future__ import annotations

import pytest

from topq_dist.ps.config import ServingConfig, TrainingConfig


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
    assert TrainingConfig(inner_opt="sgd", max_staleness=0).max_staleness == 0


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), "60"])
def test_times_are_finite_and_above_zero(value: float) -> None:
    with pytest.raises(ValueError, match=r"lease_s=.*: expected a number above 0"):
        ServingConfig(lease_s=value)
    with pytest.raises(ValueError, match=r"round_timeout_s=.*: expected a number above 0"):
        ServingConfig(round_timeout_s=value)

"""Saved states of the hook: whether they fit, and how residuals move to another world size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from topq_dist.ddp.exchange import Link


def check_states(
    states: Sequence[Mapping[str, Any]],
    shapes: Mapping[str, tuple[int, ...]],
    link: Link | None,
) -> None:
    """Raise ValueError unless these are the states of one run of a model with these shapes.

    With a link the only state must be that of its rank; without, there must be one for each rank
    of the old run, in rank order.
    """
    if not states:
        raise ValueError("no states: expected one for each rank of the saved run")
    for at, state in enumerate(states):
        expected = {
            "version": 1,
            "world_size": link.size if link else len(states),
            "rank": link.rank if link else at,
        }
        for key, value in expected.items():
            if state.get(key) != value:
                raise ValueError(f"state has {key}={state.get(key)!r}: expected {value}")
        for name, residual in state["residuals"].items():
            if tuple(residual.shape) != shapes.get(name):
                raise ValueError(
                    f"state has a residual of {name!r} with shape {tuple(residual.shape)}: "
                    f"expected {shapes.get(name, 'no such parameter in this model')}"
                )


def merged_residuals(states: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return the sum of the states' residuals by name."""
    merged: dict[str, Tensor] = {}
    for state in states:
        for name, residual in state["residuals"].items():
            merged[name] = merged[name] + residual if name in merged else residual
    return merged

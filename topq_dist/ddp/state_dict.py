"""Saved states of the hook: whether they fit, and how residuals move to other ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from topq_dist.compress.residual import check_residual
from topq_dist.ddp.momentum import Momentum
from topq_dist.ddp.sparsity_policy import SparsityPolicy
from topq_dist.exchange.base import Exchange
from topq_dist.telemetry import Stats
from topq_dist.validation import check_number

STATE_VERSION = 1
_FIELDS = {
    "residuals": Mapping,
    "density": Mapping,
    "stats": Mapping,
    "chosen_exchange": str | None,
}


def check_state(
    state: Mapping[str, Any],
    identity: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    feeds_back: bool,
) -> None:
    """Raise ValueError or TypeError unless this is a state with this identity and model."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state is a {type(state).__name__}: expected what state_dict returned")
    for key, value in identity.items():
        if state.get(key) != value:
            raise ValueError(f"state has {key}={state.get(key)!r}: expected {value}")
    for key, kind in _FIELDS.items():
        if key not in state:
            raise ValueError(f"state lacks {key!r}: expected what state_dict returned")
        if not isinstance(state[key], kind):
            raise TypeError(f"state has {key}={state[key]!r}: expected what state_dict returned")
    # states of before lack it
    dense_steps = state.get("dense_steps", 0)
    if isinstance(dense_steps, bool) or not isinstance(dense_steps, int) or dense_steps < 0:
        raise ValueError(f"state has dense_steps={dense_steps!r}: expected a whole number from 0")
    if set(state["stats"]) != set(vars(Stats())):
        raise ValueError(
            f"state has stats of {list(state['stats'])}: expected {list(vars(Stats()))}"
        )
    for key, total in state["stats"].items():
        check_number(f"stats[{key!r}]", total)
    if state["residuals"] and not feeds_back:
        raise ValueError("state has residuals: expected a hook with error_feedback=True")
    for name, residual in state["residuals"].items():
        check_residual(name, residual)
        if tuple(residual.shape) != shapes.get(name):
            raise ValueError(
                f"state has a residual of {name!r} with shape {tuple(residual.shape)}: "
                f"expected {shapes.get(name, 'no such parameter in this model')}"
            )


def check_states(
    states: Sequence[Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]], feeds_back: bool
) -> None:
    """Raise unless these are the states of every rank of one run of this model, in rank order."""
    if not states:
        raise ValueError("no states: expected one for each rank of the saved run")
    for rank, state in enumerate(states):
        identity = {"version": STATE_VERSION, "world_size": len(states), "rank": rank}
        check_state(state, identity, shapes, feeds_back)


class AssignedStates(NamedTuple):
    """What a rank takes up of the states it was given.

    mine: those whose residuals it takes over. every: all, or none on a rank that has no residuals.
    first: the one whose other entries it takes.
    """

    states: Sequence[Mapping[str, Any]]
    mine: Sequence[Mapping[str, Any]]
    every: Sequence[Mapping[str, Any]]
    first: Mapping[str, Any]


def assign_states(
    state: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    identity: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    feeds_back: bool,
) -> AssignedStates:
    """Return a rank's part of one state, its own, or of those of every rank of another run.

    identity: the rank's own. Raises what `check_state` or `check_states` raises.
    """
    if isinstance(state, Mapping):
        check_state(state, identity, shapes, feeds_back)
        return AssignedStates([state], [state], [state], state)
    states = list(state)
    check_states(states, shapes, feeds_back)
    owners = identity["world_size"] // identity["ranks_per_node"]
    owner, follower = divmod(identity["rank"], identity["ranks_per_node"])
    first = states[min(identity["rank"], len(states) - 1)]
    if follower:
        return AssignedStates(states, [], [], first)
    return AssignedStates(states, states[owner::owners], states, first)


def load_states(
    state: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    identity: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    feeds_back: bool,
    momentum: Momentum,
    sparsity: SparsityPolicy,
    exchange: Exchange,
) -> Stats:
    """Have a hook's parts take up what `TopQState.load_state_dict` was given; return its stats.

    Raises ValueError or TypeError, having changed nothing, for what does not fit.
    """
    assigned = assign_states(state, identity, shapes, feeds_back)
    for one in assigned.states:
        momentum.check_state(one, shapes)
    residuals = merged([one["residuals"] for one in assigned.mine])
    first = assigned.first
    stats = Stats(**first["stats"])
    chosen = state["chosen_exchange"] if isinstance(state, Mapping) else None
    exchange.check_chosen(chosen)
    sparsity.load_state_dict(first["density"])
    # with another number of ranks another exchange may be the cheapest, and residuals that have
    # moved are flushed from the beginning
    dense_steps = first.get("dense_steps", 0) if isinstance(state, Mapping) else 0
    exchange.resume(chosen, dense_steps)
    momentum.load_states(assigned.mine, assigned.every)
    momentum.load_residuals(residuals)
    return stats


def merged(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the sum of the states' tensors by name."""
    sums: dict[str, Tensor] = {}
    for state in states:
        for name, tensor in state.items():
            there = sums.get(name)
            sums[name] = tensor if there is None else there + tensor.to(there.device)
    return sums

"""Saved states of the hook: whether they fit, and how residuals move to other ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from topq_dist.compress.layout import in_order, memory_order
from topq_dist.compress.residual import check_residual, merged
from topq_dist.exchange.collectives import CommContext
from topq_dist.hook.parts import HookParts, Ranks
from topq_dist.telemetry import Stats
from topq_dist.validation import check_number

STATE_VERSION = 1
# of a state's tensors; a state of before, without "order", has them in that of its parameters'
# memory, shaped as if it were this one
ROW_ORDER = "rows"
# one rank's, or those of all ranks
SavedState: TypeAlias = Mapping[str, Any] | Sequence[Mapping[str, Any]]
_WHOSE = (
    "each rank's state is its own, so save one a rank; or save what state_dict(all_ranks=True) "
    "returns on rank 0, or a list of every rank's, which any number of ranks load"
)
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
            remedy = "" if key == "version" else f"; {_WHOSE}"
            raise ValueError(f"state has {key}={state.get(key)!r}: expected {value}{remedy}")
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
    first: the one whose other entries it takes. is_own: whether that is this rank's own.
    """

    states: Sequence[Mapping[str, Any]]
    mine: Sequence[Mapping[str, Any]]
    every: Sequence[Mapping[str, Any]]
    first: Mapping[str, Any]
    is_own: bool


def assign_states(
    state: SavedState,
    identity: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    feeds_back: bool,
) -> AssignedStates:
    """Return a rank's part of one state, its own, or of those of every rank of another run.

    identity: the rank's own. Raises what `check_state` or `check_states` raises.
    """
    if isinstance(state, Mapping) and "ranks" in state:
        state = state["ranks"]
    if isinstance(state, Mapping):
        check_state(state, identity, shapes, feeds_back)
        return AssignedStates([state], [state], [state], state, True)
    states = list(state)
    check_states(states, shapes, feeds_back)
    if all(identity[key] == states[0].get(key) for key in ("world_size", "ranks_per_node")):
        own = states[identity["rank"]]
        return AssignedStates(states, [own], [own], own, True)
    owners = identity["world_size"] // identity["ranks_per_node"]
    owner, follower = divmod(identity["rank"], identity["ranks_per_node"])
    first = states[min(identity["rank"], len(states) - 1)]
    if follower:
        return AssignedStates(states, [], [], first, False)
    return AssignedStates(states, states[owner::owners], states, first, False)


def identity_of(parts: HookParts, context: CommContext) -> dict[str, int]:
    """Return what tells a rank's state from those of other ranks and runs."""
    return {
        "version": STATE_VERSION,
        "world_size": context.size,
        "rank": context.rank,
        "ranks_per_node": parts.per_node,
    }


def save_state(parts: HookParts, ranks: Ranks) -> dict[str, Any]:
    """Return the state of a hook on this rank: tensors, numbers and texts only."""
    momentum = parts.stages.momentum
    return {
        **identity_of(parts, ranks.context),
        "order": ROW_ORDER,
        "residuals": momentum.residuals(),
        "momentum": momentum.state_dict(),
        "density": parts.stages.sparsity.state_dict(),
        "chosen_exchange": ranks.exchange.chosen,
        "dense_steps": ranks.exchange.dense_steps,
        "stats": vars(ranks.context.meter.stats).copy(),
    }


def load_states(state: SavedState, parts: HookParts, ranks: Ranks) -> None:
    """Have a hook take up what `TopQState.load_state_dict` was given.

    Raises ValueError or TypeError, having changed nothing, for what does not fit.
    """
    stages, exchange = parts.stages, ranks.exchange
    momentum = stages.momentum
    shapes = {name: tuple(parameter.shape) for parameter, name in parts.names.items()}
    identity = identity_of(parts, ranks.context)
    assigned = assign_states(state, identity, shapes, stages.compressor.error_feedback)
    for one in assigned.states:
        momentum.check_state(one, shapes)
    first = assigned.first
    stats = Stats(**first["stats"])
    # with another number of ranks another exchange may be the cheapest, and residuals that have
    # moved are flushed from the beginning
    chosen = first["chosen_exchange"] if assigned.is_own else None
    exchange.check_chosen(chosen)
    stages.sparsity.load_state_dict(first["density"])
    exchange.resume(chosen, first.get("dense_steps", 0) if assigned.is_own else 0)
    orders = {name: order for one, name in parts.names.items() if (order := memory_order(one))}
    mine = [_in_rows(one, orders) for one in assigned.mine]
    momentum.load_states(mine, [_in_rows(one, orders) for one in assigned.every], first)
    momentum.load_residuals(merged([one["residuals"] for one in mine]))
    ranks.context.meter.stats = stats


def _in_rows(state: Mapping[str, Any], orders: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    """Return a checked state whose tensors are in the order of rows.

    orders: strides by name of the parameters that are not in memory.
    """
    if not orders or state.get("order") == ROW_ORDER:
        return state

    def tensors_in_rows(held: Any) -> Any:
        if not isinstance(held, Mapping):
            return held
        return {
            name: in_order(one.contiguous().view(-1), tuple(one.shape), orders[name])
            if isinstance(one, Tensor) and name in orders
            else one
            for name, one in held.items()
        }

    momentum = {key: tensors_in_rows(held) for key, held in state.get("momentum", {}).items()}
    return {**state, "residuals": tensors_in_rows(state["residuals"]), "momentum": momentum}

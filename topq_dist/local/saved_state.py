"""Saved states of local steps: what a rank needs to go on, and how they move to other ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from topq_dist.compress.residual import check_residual, merged
from topq_dist.local.replica import Replica
from topq_dist.telemetry import Stats
from topq_dist.validation import check_fraction, check_number

STATE_VERSION = 1
# one rank's, or those of all ranks
SavedState: TypeAlias = Mapping[str, Any] | Sequence[Mapping[str, Any]]
_TENSORS = ("outer", "residuals", "velocity", "base", "parameters")
_WHOSE = (
    "each rank's state is its own, so save one a rank; or save what state_dict(all_ranks=True) "
    "returns on rank 0, or a list of every rank's, which any number of ranks load"
)


class Loaded(NamedTuple):
    """What a rank goes on with.

    under_way: by fragment, the step that receives it, and (n,). buffers: the step that receives
    them, and what the first rank sends of them, 1-D uint8; None where none were under way.
    """

    step: int
    void_rounds: int
    stats: Stats
    under_way: dict[int, tuple[int, Tensor]]
    buffers: tuple[int, Tensor] | None = None


def save(
    replica: Replica,
    identity: Mapping[str, int],
    *,
    step: int,
    void_rounds: int,
    stats: Stats,
    under_way: Mapping[int, tuple[int, Tensor]],
    buffers: tuple[int, Tensor] | None,
) -> dict[str, Any]:
    """Return the state of a rank: tensors, numbers and texts only."""
    state: dict[str, Any] = {
        "version": STATE_VERSION,
        **identity,
        "step": step,
        "q": replica.q,
        "void_rounds": void_rounds,
        "stats": vars(stats).copy(),
        **{key: {} for key in _TENSORS},
        "residuals": replica.compressor.residuals.state_dict(),
        "under_way": [
            {
                "received_at": received_at,
                "parameters": _by_name(replica, fragment, launched),
            }
            for fragment, (received_at, launched) in under_way.items()
        ],
        # none, or one
        "buffers_under_way": [
            {"received_at": received_at, "bytes": payload}
            for received_at, payload in ([] if buffers is None else [buffers])
        ],
    }
    for place, fragment in enumerate(replica.fragments):
        vectors = {"outer": fragment.outer, "velocity": fragment.velocity, "base": fragment.base}
        vectors["parameters"] = fragment.gather()
        for key, vector in vectors.items():
            if vector is not None:
                state[key] |= _by_name(replica, place, vector)
    return state


def load(
    state: SavedState, replica: Replica, identity: Mapping[str, int], *, buffers_bytes: int
) -> Loaded:
    """Have a replica take up its own state, or those of every rank of another run.

    buffers_bytes: how many bytes the model's buffers are.

    Raises TypeError or ValueError, having changed nothing, for what does not fit.
    """
    if isinstance(state, Mapping) and "ranks" in state:
        state = state["ranks"]
    if isinstance(state, Mapping):
        _check(state, replica, identity)
        return _load_own(state, replica, buffers_bytes)
    states = list(state)
    if not states:
        raise ValueError("no states: expected one for each rank of the saved run")
    for rank, one in enumerate(states):
        _check(one, replica, {"world_size": len(states), "rank": rank})
    if all(identity[key] == states[0].get(key) for key in ("world_size", "ranks_per_node")):
        return _load_own(states[identity["rank"]], replica, buffers_bytes)
    return _load_from_others(states, replica, identity)


def load_from_peer(state: Mapping[str, Any], replica: Replica) -> Loaded:
    """Take up the state of a rank that is in the run: everything but what is that rank's own.

    The parameters are the outer ones, with which all begin after a round. Raises TypeError or
    ValueError, having changed nothing, for what does not fit.
    """
    _check(state, replica, {})
    _take_up({**state, "base": {}}, replica, residuals={}, parameters=state["outer"])
    return Loaded(state["step"], state["void_rounds"], Stats(**state["stats"]), {})


def _load_own(state: Mapping[str, Any], replica: Replica, buffers_bytes: int) -> Loaded:
    buffers = _buffers_of(state, buffers_bytes)
    _take_up(state, replica, residuals=state["residuals"], parameters=state["parameters"])
    under_way = {}
    for saved in state["under_way"]:
        for place, fragment in enumerate(replica.fragments):
            if set(saved["parameters"]) == set(fragment.layout.names):
                launched = _vector(replica, place, saved["parameters"])
                under_way[place] = (saved["received_at"], launched)
    stats = Stats(**state["stats"])
    return Loaded(state["step"], state["void_rounds"], stats, under_way, buffers)


def _load_from_others(
    states: Sequence[Mapping[str, Any]], replica: Replica, identity: Mapping[str, int]
) -> Loaded:
    """Take up the states of other ranks: the sum of their residuals stays what it was.

    All ranks begin with the outer parameters and the mean of what inner steps have changed since
    the last rounds; a round that was under way has not been.
    """
    owners = identity["world_size"] // identity["ranks_per_node"]
    owner, follower = divmod(identity["rank"], identity["ranks_per_node"])
    mine = [] if follower else states[owner::owners]
    first = states[min(identity["rank"], len(states) - 1)]
    started = {name: first["outer"][name].clone() for name in first["outer"]}
    for one in states:
        for name, tensor in one["parameters"].items():
            base = one["base"].get(name, one["outer"][name])
            started[name] += (tensor - base.to(tensor.device)).to(started[name]) / len(states)
    residuals = merged([one["residuals"] for one in mine])
    _take_up({**first, "base": {}}, replica, residuals=residuals, parameters=started)
    return Loaded(first["step"], first["void_rounds"], Stats(**first["stats"]), {})


def _take_up(
    state: Mapping[str, Any],
    replica: Replica,
    *,
    residuals: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
) -> None:
    replica.q = check_fraction("q", state["q"])
    replica.compressor.residuals.load_state_dict(residuals)
    for place, fragment in enumerate(replica.fragments):
        names = fragment.layout.names
        fragment.outer = _vector(replica, place, state["outer"])
        for key in ("velocity", "base"):
            held = names[0] in state[key]
            setattr(fragment, key, _vector(replica, place, state[key]) if held else None)
        fragment.scatter(_vector(replica, place, parameters))


def _by_name(replica: Replica, fragment: int, vector: Tensor) -> dict[str, Tensor]:
    layout = replica.layout(fragment)
    tensors = layout.tensors(vector)
    return {name: one.clone() for name, one in zip(layout.names, tensors, strict=True)}


def _vector(replica: Replica, fragment: int, tensors: Mapping[str, Tensor]) -> Tensor:
    layout, like = replica.layout(fragment), replica.fragments[fragment].outer
    flat = torch.empty_like(like)
    for name, place in zip(layout.names, layout.tensors(flat), strict=True):
        place.copy_(tensors[name])
    return flat


def _check(state: Any, replica: Replica, identity: Mapping[str, int]) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(f"state is a {type(state).__name__}: expected what state_dict returned")
    for key, value in {"version": STATE_VERSION, **identity}.items():
        if state.get(key) != value:
            remedy = "" if key == "version" else f"; {_WHOSE}"
            raise ValueError(f"state has {key}={state.get(key)!r}: expected {value}{remedy}")
    for key in ("step", "void_rounds"):
        _check_count(f"state[{key!r}]", state.get(key))
    check_fraction("state['q']", state.get("q"))
    if set(_mapping(state, "stats")) != set(vars(Stats())):
        raise ValueError(
            f"state has stats of {list(state['stats'])}: expected {list(vars(Stats()))}"
        )
    for key, total in state["stats"].items():
        check_number(f"stats[{key!r}]", total)
    shapes = {
        name: shape
        for fragment in replica.fragments
        for name, shape in zip(fragment.layout.names, fragment.layout.shapes, strict=True)
    }
    for key in _TENSORS:
        _check_tensors(key, _mapping(state, key), shapes)
    for key in ("outer", "parameters"):
        _check_all_there(key, state[key], shapes)
    # of a fragment all names have one, or none
    for fragment in replica.fragments:
        names = set(fragment.layout.names)
        for key in ("velocity", "base"):
            if 0 < len(names & set(state[key])) < len(names):
                raise ValueError(
                    f"state has {key} of some parameters of a fragment only: expected the number "
                    "of fragments that it was saved with"
                )
    _check_under_way(state, replica, shapes)


def _check_under_way(
    state: Mapping[str, Any], replica: Replica, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    under_way = state.get("under_way")
    if not isinstance(under_way, Sequence):
        raise TypeError(f"state has under_way={under_way!r}: expected what state_dict returned")
    fragments = [set(fragment.layout.names) for fragment in replica.fragments]
    for saved in under_way:
        if not isinstance(saved, Mapping):
            raise TypeError(f"state has under_way={under_way!r}: expected what state_dict returned")
        _check_count("state['under_way'] received_at", saved.get("received_at"))
        _check_tensors("parameters under way", _mapping(saved, "parameters"), shapes)
        if set(saved["parameters"]) not in fragments:
            raise ValueError(
                "state has a round under way of other parameters than a fragment's: expected the "
                "number of fragments that it was saved with"
            )


def _buffers_of(state: Mapping[str, Any], buffers_bytes: int) -> tuple[int, Tensor] | None:
    """Return the buffers under way; states of before this key have none."""
    found = state.get("buffers_under_way", [])
    is_list = isinstance(found, Sequence) and all(isinstance(one, Mapping) for one in found)
    if not is_list or len(found) > 1:
        raise TypeError(f"state has buffers_under_way={found!r}: expected what state_dict returned")
    for saved in found:
        _check_count("state['buffers_under_way'] received_at", saved.get("received_at"))
        payload, expected = saved.get("bytes"), 0 if state["rank"] else buffers_bytes
        if not isinstance(payload, Tensor) or payload.dtype != torch.uint8:
            raise TypeError(f"state has buffers under way that are no bytes: {payload!r}")
        if tuple(payload.shape) != (expected,):
            raise ValueError(
                f"state has buffers under way of {payload.numel()} bytes: expected {expected}, "
                "those of this model's"
            )
        return saved["received_at"], payload
    return None


def _mapping(state: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if key not in state:
        raise ValueError(f"state lacks {key!r}: expected what state_dict returned")
    if not isinstance(state[key], Mapping):
        raise TypeError(f"state has {key}={state[key]!r}: expected what state_dict returned")
    found: Mapping[str, Any] = state[key]
    return found


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}={value!r}: expected a whole number from 0")


def _check_tensors(
    key: str, tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    for name, tensor in tensors.items():
        if key == "residuals":
            check_residual(name, tensor)
        if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point or tensor.is_meta:
            raise TypeError(f"state has {key} of {name!r} that is no float tensor: {tensor!r}")
        if tuple(tensor.shape) != shapes.get(name):
            raise ValueError(
                f"state has {key} of {name!r} with shape {tuple(tensor.shape)}: "
                f"expected {shapes.get(name, 'no such parameter in this model')}"
            )


def _check_all_there(
    key: str, tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    missing = sorted(set(shapes) - set(tensors))
    if missing:
        raise ValueError(f"state has no {key} of {', '.join(missing)}: expected every parameter's")

"""The inner optimizer's state as named tensors and JSON, and back, bit for bit.

torch's own load_state_dict casts state to the parameters' dtype, and changes bits with that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topq_dist.ps.model.flat import copy_of

_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, kw_only=True)
class InnerState:
    """A checked state: hyperparameters of each group, and state of each tensor by its name."""

    groups: list[dict[str, Any]]
    by_name: dict[str, dict[str, Any]]


def inner_state(
    inner: torch.optim.Optimizer, named: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state's tensors by key, not copied, and the rest fit for JSON."""
    tensors: dict[str, Tensor] = {}
    by_name: dict[str, dict[str, Any]] = {}
    for place, (name, parameter) in enumerate(named.items()):
        if parameter not in inner.state:
            continue
        plain: dict[str, Any] = {}
        for key, value in inner.state[parameter].items():
            if isinstance(value, Tensor):
                tensors[f"inner.{place}.{key}"] = value
            else:
                plain[key] = value
        by_name[name] = plain
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in inner.param_groups
    ]
    return tensors, {"groups": groups, "state": by_name}


def check_inner_state(
    inner: torch.optim.Optimizer,
    named: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    metadata: Any,
) -> InnerState:
    """Return the state that `inner_state` once made of an optimizer like this one.

    Tensors are copied. Raises ValueError for anything else.
    """
    if not isinstance(metadata, Mapping) or set(metadata) != {"groups", "state"}:
        raise ValueError("the inner optimizer's state is missing: expected its groups and state")
    groups, by_name = metadata["groups"], metadata["state"]
    if not isinstance(groups, list) or len(groups) != len(inner.param_groups):
        raise ValueError(f"state of other groups: expected {len(inner.param_groups)}")
    if not isinstance(by_name, Mapping) or not set(by_name) <= set(named):
        raise ValueError("state of tensors that the model lacks")
    loaded: dict[str, dict[str, Any]] = {name: {} for name in named if name in by_name}
    for name, state in loaded.items():
        for key, value in _plain_state(name, by_name[name]):
            state[key] = value
    places = {str(place): name for place, name in enumerate(named)}
    for label, tensor in tensors.items():
        head, _, rest = label.partition(".")
        place, _, key = rest.partition(".")
        name = places.get(place, "")
        if head != "inner" or not key or name not in loaded:
            raise ValueError(f"state holds a tensor {label!r} that no optimizer here has")
        _check_fits(label, tensor, named[name])
        loaded[name][key] = copy_of(tensor.detach())
    return InnerState(
        groups=[
            _checked_group(place, group, saved)
            for place, (group, saved) in enumerate(zip(inner.param_groups, groups, strict=True))
        ],
        by_name=loaded,
    )


def load_inner_state(
    inner: torch.optim.Optimizer, named: Mapping[str, Tensor], state: InnerState
) -> None:
    """Make `state` the optimizer's."""
    for group, saved in zip(inner.param_groups, state.groups, strict=True):
        group.update(saved)
    inner.state.clear()
    for name, values in state.by_name.items():
        inner.state[named[name]] = dict(values)


def _plain_state(name: str, state: Any) -> list[tuple[str, Any]]:
    if not isinstance(state, Mapping):
        raise ValueError(
            f"state of tensor {name!r} is a {type(state).__name__}: expected an object"
        )
    for key, value in state.items():
        if not isinstance(value, _PLAIN):
            raise ValueError(f"state of tensor {name!r} has {key}={value!r}: expected a number")
    return list(state.items())


def _check_fits(label: str, tensor: Tensor, parameter: Tensor) -> None:
    """Raise ValueError unless the tensor is a scalar, or the parameter's shape reduced."""
    dimensions_fit = tensor.dim() in (0, parameter.dim()) and all(
        length in (1, full) for length, full in zip(tensor.shape, parameter.shape, strict=False)
    )
    if not dimensions_fit:
        raise ValueError(
            f"state has {label!r} of shape {tuple(tensor.shape)}: expected one that goes with a "
            f"tensor of shape {tuple(parameter.shape)}"
        )


def _checked_group(place: int, group: Mapping[str, Any], saved: Any) -> dict[str, Any]:
    expected = {key: value for key, value in group.items() if key != "params"}
    if not isinstance(saved, Mapping) or set(saved) != set(expected):
        raise ValueError(f"state of group {place} has other keys than {', '.join(expected)}")
    # JSON has no tuples
    return {
        key: tuple(saved[key]) if isinstance(value, tuple) else saved[key]
        for key, value in expected.items()
    }

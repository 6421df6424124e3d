"""The inner optimizer's state as named tensors and JSON, and back, bit for bit.

torch's own load_state_dict casts state to the parameters' dtype, and changes bits with that.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topq_dist.ps.model.flat import copy_of

_PLAIN = (bool, int, float, str, type(None))
# is taken out and given back with the momentum
_OPTIONAL = "momentum_buffer"
_EXAMPLE_LENGTH = 2
# the last dimensions of an example that have that length; some optimizers keep sums over two
_EXAMPLE_DIMENSIONS = 4


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
    checked = [
        _checked_group(place, group, saved)
        for place, (group, saved) in enumerate(zip(inner.param_groups, groups, strict=True))
    ]
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
        loaded[name][key] = copy_of(tensor.detach())
    _check_complete(inner, checked, named, loaded)
    return InnerState(groups=checked, by_name=loaded)


def copy_inner_state(inner: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> InnerState:
    """Return a copy of the state of this very optimizer, which `load_inner_state` takes."""
    return InnerState(
        groups=[
            {key: value for key, value in group.items() if key != "params"}
            for group in inner.param_groups
        ],
        by_name={
            name: {
                key: copy_of(value) if isinstance(value, Tensor) else value
                for key, value in inner.state[parameter].items()
            }
            for name, parameter in named.items()
            if parameter in inner.state
        },
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


def _check_complete(
    inner: torch.optim.Optimizer,
    groups: Sequence[Mapping[str, Any]],
    named: Mapping[str, Tensor],
    loaded: Mapping[str, Mapping[str, Any]],
) -> None:
    """Raise ValueError unless each tensor's state is what a step of this optimizer makes of it.

    It would raise in the next one otherwise, when half of the tensors have taken it.
    """
    group_of = {
        id(parameter): place
        for place, group in enumerate(inner.param_groups)
        for parameter in group["params"]
    }
    examples: dict[tuple[int, torch.dtype, int], Mapping[str, Any]] = {}
    for name, state in loaded.items():
        parameter = named[name]
        kind = group_of[id(parameter)], parameter.dtype, parameter.dim()
        if kind not in examples:
            examples[kind] = _example_state(inner, groups[kind[0]], *kind[1:])
        expected = examples[kind]
        for key in expected.keys() | state.keys():
            found, wanted = state.get(key), expected.get(key)
            if key == _OPTIONAL and found is None:
                continue
            # where that has no momentum, the buffer is like the parameter nevertheless
            wanted = parameter if key == _OPTIONAL else wanted
            if _kind_of(found) != _kind_of(wanted, parameter):
                raise ValueError(
                    f"state of tensor {name!r} has {_kind_of(found)} as {key!r}: expected "
                    f"{_kind_of(wanted, parameter)}"
                )


def _example_state(
    inner: torch.optim.Optimizer, group: Mapping[str, Any], dtype: torch.dtype, dimensions: int
) -> Mapping[str, Any]:
    parameter = torch.zeros(_example_shape(dimensions), dtype=dtype)
    parameter.grad = torch.ones_like(parameter)
    try:
        cls: Any = type(inner)
        optimizer = cls([{"params": [parameter], **group}])
        optimizer.step()
    except Exception as error:
        raise ValueError(
            f"{type(inner).__name__} does not step with {dict(group)}: {error}"
        ) from error
    state: Mapping[str, Any] = optimizer.state[parameter]
    return state


def _example_shape(dimensions: int) -> tuple[int, ...]:
    long = min(dimensions, _EXAMPLE_DIMENSIONS)
    return (1,) * (dimensions - long) + (_EXAMPLE_LENGTH,) * long


def _kind_of(value: Any, parameter: Tensor | None = None) -> str:
    """Return dtype and shape, or type, of a value, of an example's for `parameter`."""
    if not isinstance(value, Tensor):
        return "nothing" if value is None else type(value).__name__
    shape = tuple(value.shape)
    if parameter is not None and value is not parameter and value.dim() == parameter.dim():
        # some optimizers keep a row's or a column's sums
        shape = tuple(
            full if length == whole else length
            for length, whole, full in zip(
                shape, _example_shape(len(shape)), parameter.shape, strict=True
            )
        )
    return f"{value.dtype} of shape {shape}"


def _checked_group(place: int, group: Mapping[str, Any], saved: Any) -> dict[str, Any]:
    expected = {key: value for key, value in group.items() if key != "params"}
    if not isinstance(saved, Mapping) or set(saved) != set(expected):
        raise ValueError(f"state of group {place} has other keys than {', '.join(expected)}")
    return {
        key: _like(f"{key!r} of group {place}", value, saved[key])
        for key, value in expected.items()
    }


def _like(what: str, expected: Any, saved: Any) -> Any:
    """Return `saved`, a list as the tuple that JSON has not, where it is of the kind expected."""
    if isinstance(expected, tuple):
        if isinstance(saved, list | tuple) and len(saved) == len(expected):
            return tuple(_like(what, *pair) for pair in zip(expected, saved, strict=True))
    elif isinstance(expected, int | float) and not isinstance(expected, bool):
        if isinstance(saved, int | float) and not isinstance(saved, bool) and _is_finite(saved):
            return saved
    elif type(saved) is type(expected):
        return saved
    raise ValueError(f"state has {saved!r} as {what}: expected something like {expected!r}")


def _is_finite(number: float) -> bool:
    return abs(number) <= sys.float_info.max

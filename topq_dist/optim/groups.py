"""Parameter groups as a caller gives them: copied, listed, and fitted to those there are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.optimizer import required

ParamGroup: TypeAlias = dict[str, Any]
Params: TypeAlias = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[ParamGroup]


def with_defaults(defaults: Mapping[str, Any] | None, **options: Any) -> dict[str, Any]:
    """Return the options with what `defaults` says instead, if it says anything."""
    if not isinstance(defaults, Mapping | None):
        raise TypeError(f"defaults={defaults!r}: expected a dict of options, or None")
    return {**options, **(defaults or {})}


def option(group: Mapping[str, Any], name: str) -> Any:
    """Return an option of a group that must have it."""
    # by its type, since a copy of `required` is another object
    if isinstance(group.get(name, required), type(required)):
        raise TypeError(f"{name} is required: give it by keyword, in defaults or in each group")
    return group[name]


def check_complete(group: Mapping[str, Any]) -> None:
    """Raise TypeError where torch's `required` still stands for an option."""
    for name in group:
        option(group, name)


def own_groups(params: Params | None) -> list[ParamGroup]:
    """Return fresh group dicts with their parameters listed; what is wrong in them, torch says."""
    if params is None or isinstance(params, Tensor):
        raise TypeError(
            f"params={'a tensor' if params is not None else None}: expected an iterable of "
            "parameters or of dicts, unless InnerOpt is an instance"
        )
    entries: list[Any] = list(params)
    if not entries:
        raise ValueError("params=[]: expected at least one parameter or parameter group")
    if not isinstance(entries[0], Mapping):
        entries = [{"params": entries}]
    groups = []
    for entry in entries:
        if not isinstance(entry, Mapping) or "params" not in entry:
            raise TypeError(f"parameter group {entry!r}: expected a dict with 'params'")
        group = dict(entry)
        if isinstance(group["params"], Iterator):
            group["params"] = list(group["params"])
        elif isinstance(group["params"], Tensor):
            group["params"] = [group["params"]]
        groups.append(group)
    return groups


def fitted(state_dict: Mapping[str, Any], groups: list[ParamGroup]) -> list[ParamGroup]:
    """Return the saved groups with the parameters they are for, or raise where they do not fit."""
    if not isinstance(state_dict.get("param_groups"), list) or "state" not in state_dict:
        raise ValueError(
            f"state_dict with keys {list(state_dict)}: expected 'state' and a list 'param_groups'"
        )
    saved = [len(group["params"]) for group in state_dict["param_groups"]]
    here = [len(group["params"]) for group in groups]
    if saved != here:
        raise ValueError(
            f"state_dict with groups of {saved} parameters: expected groups of {here} parameters"
        )
    return [
        {**ours, "params": group["params"]}
        for ours, group in zip(state_dict["param_groups"], groups, strict=True)
    ]


def decays_decoupled(group: Mapping[str, Any], optimizer: Optimizer | None) -> bool:
    """Return whether a group's weight decay is AdamW's, apart from the gradient."""
    return isinstance(optimizer, AdamW) or bool(group.get("decoupled_weight_decay", False))

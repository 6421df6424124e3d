"""The inner optimizer: one of torch.optim's by name, its options checked against its signature."""

from __future__ import annotations

import fnmatch
import inspect
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from topq_dist.ps.protocol.config import GroupRule, TrainingConfig

_log = logging.getLogger(__name__)

_REFUSED_CLASSES = {
    "LBFGS": "it evaluates the loss again and again, which only workers can",
    "SparseAdam": "it takes gradients as sparse tensors only",
}
_REFUSED_OPTIONS = {
    "params": "the model arrives from the workers",
    "differentiable": "nobody differentiates through the server's step",
    "capturable": "it is for CUDA graphs, and the server computes on the CPU",
}
# torch reads them off the first group, or builds state by them
_WHOLE_OPTIMIZER_OPTIONS = ("foreach", "fused")
# what a wrong value of an option makes torch.optim raise, at the latest in a first step
_WRONG_VALUE = (
    TypeError,
    ValueError,
    RuntimeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    AttributeError,
)


def optimizer_class(inner_opt: str) -> type[torch.optim.Optimizer]:
    """Return the class of torch.optim with this name, in any case.

    Raises ValueError for any other name, and for a class that cannot run on a server.
    """
    known = {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value)
        and issubclass(value, torch.optim.Optimizer)
        and value is not torch.optim.Optimizer
    }
    found = known.get(inner_opt.lower()) if isinstance(inner_opt, str) else None
    usable = sorted(c.__name__ for c in known.values() if c.__name__ not in _REFUSED_CLASSES)
    if found is None:
        raise ValueError(f"inner_opt={inner_opt!r}: expected one of {', '.join(usable)}")
    if found.__name__ in _REFUSED_CLASSES:
        reason = _REFUSED_CLASSES[found.__name__]
        raise ValueError(f"inner_opt={inner_opt!r}: {reason}; expected one of {', '.join(usable)}")
    return found


def check_inner_optimizer(config: TrainingConfig) -> None:
    """Raise ValueError, naming the option, unless the inner optimizer can be made and can step.

    For a server's start, when there is no model yet.
    """
    cls = optimizer_class(config.inner_opt)
    rules = [{}, *(_checked_rule(cls, config.inner_opt, rule) for rule in config.groups)]
    # as they are given first, so that an error names nothing that is ours
    for take in (_plain_options, _checked_options):
        options = take(cls, config.inner_opt, config.options)
        for rule in rules:
            _try(cls, config.inner_opt, {**options, **rule})


def make_inner_optimizer(
    config: TrainingConfig, named: Mapping[str, Tensor]
) -> tuple[torch.optim.Optimizer, list[tuple[str, ...]]]:
    """Return the optimizer over these tensors, and the names of each of its parameter groups.

    Tensors that no rule matches come first, then one group for each rule that matches any. Unless
    the options say otherwise, fused kernels are used where the class has them and no tensor is of
    half precision, else foreach: on the CPU fused ones are up to seven times as fast, and their
    bits do not depend on the number of threads.

    Raises ValueError, naming inner_opt and the option, for what torch.optim or this server does
    not take.
    """
    check_inner_optimizer(config)
    cls = optimizer_class(config.inner_opt)
    half = any(tensor.dtype.itemsize == 2 for tensor in named.values())
    options = _checked_options(cls, config.inner_opt, config.options, half=half)
    groups, names = [], []
    for rule, members in _partition(config.groups, named):
        extra = {} if rule is None else _checked_rule(cls, config.inner_opt, rule)
        groups.append({"params": [named[name] for name in members], **extra})
        names.append(members)
    return _construct(cls, config.inner_opt, groups, options), names


def example_optimizers(config: TrainingConfig) -> dict[str, torch.optim.Optimizer]:
    """Return an optimizer by each rule's pattern, over a tensor of its own; by "", without a rule.

    Raises ValueError as `check_inner_optimizer` does.
    """
    cls = optimizer_class(config.inner_opt)
    options = _plain_options(cls, config.inner_opt, config.options)
    rules: dict[str, dict[str, Any]] = {"": {}}
    for rule in config.groups:
        rules.setdefault(rule.pattern, _checked_rule(cls, config.inner_opt, rule))
    return {
        pattern: _construct(cls, config.inner_opt, [torch.zeros(2, 2)], {**options, **extra})
        for pattern, extra in rules.items()
    }


def _partition(
    rules: Sequence[GroupRule], named: Mapping[str, Tensor]
) -> list[tuple[GroupRule | None, tuple[str, ...]]]:
    members: list[list[str]] = [[] for _ in range(len(rules) + 1)]
    for name in named:
        matching = (
            place
            for place, rule in enumerate(rules, start=1)
            if fnmatch.fnmatchcase(name, rule.pattern)
        )
        members[next(matching, 0)].append(name)
    for rule, matched in zip(rules, members[1:], strict=True):
        if not matched:
            # no error: where several servers share a model, each has only some of its tensors
            _log.warning("the group pattern %r matches no tensor of this server", rule.pattern)
    return [
        (rule, tuple(matched))
        for rule, matched in zip([None, *rules], members, strict=True)
        if matched
    ]


def _checked_rule(
    cls: type[torch.optim.Optimizer], inner_opt: str, rule: GroupRule
) -> dict[str, Any]:
    for name in _WHOLE_OPTIMIZER_OPTIONS:
        if name in rule.options:
            raise ValueError(
                f"inner_opt={inner_opt!r} takes {name} for all groups alike: expected it among "
                f"the options, not for the pattern {rule.pattern!r}"
            )
    return _plain_options(cls, inner_opt, rule.options)


def _checked_options(
    cls: type[torch.optim.Optimizer],
    inner_opt: str,
    options: Mapping[str, Any],
    *,
    half: bool = False,
) -> dict[str, Any]:
    checked = _plain_options(cls, inner_opt, options)
    if half and cls is torch.optim.SGD and checked.get("fused"):
        # torch 2.13 writes back the last few elements of such a tensor only
        raise ValueError(
            f"inner_opt={inner_opt!r} with fused=True: torch's fused kernel leaves parameters of "
            "half precision as they are; expected foreach"
        )
    if not any(name in checked for name in _WHOLE_OPTIMIZER_OPTIONS):
        known = inspect.signature(cls).parameters
        usable = ("foreach",) if half else ("fused", "foreach")
        checked.update(dict.fromkeys([name for name in usable if name in known][:1], True))
    return checked


def _plain_options(
    cls: type[torch.optim.Optimizer], inner_opt: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    known = inspect.signature(cls).parameters
    takes = [name for name in known if name not in _REFUSED_OPTIONS]
    checked = {}
    for name, value in options.items():
        if name in _REFUSED_OPTIONS:
            raise ValueError(f"inner_opt={inner_opt!r} with {name}: {_REFUSED_OPTIONS[name]}")
        if name not in known:
            raise ValueError(
                f"inner_opt={inner_opt!r} has no option {name!r}: expected one of "
                f"{', '.join(takes)}"
            )
        default = False if name in _WHOLE_OPTIMIZER_OPTIONS else known[name].default
        checked[name] = _like(default, value, f"inner_opt={inner_opt!r} with {name}={value!r}")
    return checked


def _like(default: Any, value: Any, what: str) -> Any:
    """Return `value`, a list as a tuple, where it is as plain and of the kind that `default` is."""
    if isinstance(value, list | tuple):
        if isinstance(default, tuple):
            if len(value) != len(default):
                raise ValueError(f"{what}: expected {len(default)} numbers, as in {default}")
            return tuple(_like(d, v, what) for d, v in zip(default, value, strict=True))
    elif isinstance(default, bool):
        if isinstance(value, bool):
            return value
        raise ValueError(f"{what}: expected True or False")
    elif isinstance(default, int | float):
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return value
        raise ValueError(f"{what}: expected a finite number")
    elif default is None or isinstance(default, str):
        if value is None or isinstance(value, str | bool | int):
            return value
        if isinstance(value, float) and math.isfinite(value):
            return value
    raise ValueError(f"{what}: expected something like {default!r}")


def _try(cls: type[torch.optim.Optimizer], inner_opt: str, options: Mapping[str, Any]) -> None:
    parameter = torch.zeros(2, 2)
    parameter.grad = torch.ones(2, 2)
    optimizer = _construct(cls, inner_opt, [parameter], options)
    try:
        optimizer.step()
    except _WRONG_VALUE as error:
        raise ValueError(f"inner_opt={inner_opt!r} with {_told(options)}: {error}") from error


def _construct(
    cls: type[torch.optim.Optimizer],
    inner_opt: str,
    params: Iterable[Any],
    options: Mapping[str, Any],
) -> torch.optim.Optimizer:
    try:
        return cls(params, **options)
    except _WRONG_VALUE as error:
        raise ValueError(f"inner_opt={inner_opt!r} with {_told(options)}: {error}") from error


def _told(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items()) or "no options"

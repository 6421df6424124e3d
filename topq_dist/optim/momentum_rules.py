"""The momentum of any torch optimizer: how to take it out, and a switch that does it for a step.

Error feedback acts as a momentum, and a momentum behind it breaks training; so whoever sparsifies
takes the optimizer's out. What a momentum adds up to is kept in the rate: SGD moves along the sum
of a gradient's shares, lr (1 - dampening) (1 + m + m^2 + ...). Adam's kind averages, which does not
change how far it goes.

Source: "SparseLoCo" (arXiv:2508.15706), whose error accumulator stands in for outer momentum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from topq_dist.optim.chained import ChainedParamTransformingOptimizer
from topq_dist.optim.gradient_transforming import TopQGradientOptimizer
from topq_dist.optim.groups import ParamGroup, decays_decoupled
from topq_dist.optim.step_switch import StepSwitch

_MOMENTS = frozenset({"exp_avg", "momentum_buffer"})
_INNER_NAMES = ("inner_opt", "optim", "optimizer", "base_optimizer")

# where more is sent there is little that could act as a momentum
SPARSE_BELOW = 0.5

MomentumRule: TypeAlias = Callable[[Mapping[str, Any]], dict[str, Any]]


def register_momentum_rule(
    optimizer_class: type[Optimizer], rule: MomentumRule, *, divides_by_mean_square: bool = False
) -> None:
    """Say how the momentum of an optimizer class, and of classes derived from it, is taken out.

    Args:
        optimizer_class: a class of torch optimizers; a rule that it has is replaced.
        rule: takes a parameter group with the user's values, and returns the options to step with
            instead: those of the same optimizer without momentum, {} where the group has none.
            Called at every step, so that schedules of rate and momentum are followed. For one like
            Lion: `lambda group: {"betas": (0.0, group["betas"][1])}`.
        divides_by_mean_square: whether its steps divide by the root of a moving mean of squared
            gradients, as Adam's do; while gradients agree over steps, its rate is then raised by
            what such a division takes off sums of them, and keep_rate spares it sudden arrivals.

    Raises TypeError for anything else.
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise TypeError(
            f"optimizer_class={optimizer_class!r}: expected a class of torch optimizers"
        )
    if not callable(rule):
        raise TypeError(f"rule={rule!r}: expected a function of a parameter group")
    if not isinstance(divides_by_mean_square, bool):
        raise TypeError(
            f"divides_by_mean_square={divides_by_mean_square!r}: expected True or False"
        )
    _known[optimizer_class] = _Known(
        rule,
        divides_by_mean_square=divides_by_mean_square,
        remembers_squares=divides_by_mean_square,
    )


def takes_momentum_out(sent_fraction: float) -> bool:
    """Return whether a step that sends this fraction of its gradients does without momentum."""
    return sent_fraction < SPARSE_BELOW


def stepping(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that moves the parameters: the one within those that wrap another.

    TopQGradientOptimizer and its bases, ZeroRedundancyOptimizer, Accelerate's, SAM and others of
    the kind hold it under one of four names. A class with a rule of its own is itself.
    """
    found = optimizer
    for found in _levels(optimizer):
        if _known_of(type(found)) is not None:
            break
    return found


def sparsifier(optimizer: Optimizer | None) -> TopQGradientOptimizer | None:
    """Return the TopQGradientOptimizer that is `optimizer`, or is within it; None without one.

    Looks where `stepping` does. Raises ValueError, saying what to give, for one that a hook cannot
    take the sparsifying from: one in a chain, and one of several.
    """
    if optimizer is None:
        return None
    levels = list(_levels(optimizer))
    for level in levels:
        if isinstance(level, ChainedParamTransformingOptimizer) and level.sparsifies:
            raise ValueError(
                f"optimizer has a TopQGradientOptimizer in a {type(level).__name__}, which would "
                "sparsify the average once more: expected it around the others, "
                "TopQGradientOptimizer(None, chain_of_the_others, q=...), or no such optimizer, "
                "and q given to the hook"
            )
    found = [level for level in levels if isinstance(level, TopQGradientOptimizer)]
    if len(found) > 1:
        raise ValueError(
            f"optimizer has {len(found)} TopQGradientOptimizers, one within another, of which the "
            "hook can sparsify for one alone: expected one at most"
        )
    return found[0] if found else None


def _levels(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Yield an optimizer, then the one that it wraps, and so on."""
    seen: set[int] = set()
    level: Optimizer | None = optimizer
    while level is not None and id(level) not in seen:
        yield level
        seen.add(id(level))
        held = [getattr(level, name, None) for name in _INNER_NAMES]
        level = next((one for one in held if isinstance(one, Optimizer)), None)


def momentum_rule(optimizer: Optimizer) -> MomentumRule | None:
    """Return the rule for the class of `stepping(optimizer)`, None where none is known."""
    known = _known_of(type(stepping(optimizer)))
    return None if known is None else known.rule


def divides_by_mean_square(optimizer: Optimizer) -> bool:
    """Return whether `stepping(optimizer)` is known to divide by the root of a mean of squares."""
    known = _known_of(type(stepping(optimizer)))
    return known is not None and known.divides_by_mean_square


def remembers_squares(optimizer: Optimizer) -> bool:
    """Return whether the steps of `stepping(optimizer)` depend on squares of earlier gradients.

    Those of one that nothing is known of may.
    """
    known = _known_of(type(stepping(optimizer)))
    return known is None or known.remembers_squares


def sums_momentum(optimizer: Optimizer) -> bool:
    """Return whether the momentum of `stepping(optimizer)` is one that `summed` takes out."""
    return momentum_rule(optimizer) is summed


def has_momentum(optimizer: Optimizer, parameters: Iterable[Tensor]) -> bool:
    """Return whether a group with any of these parameters has momentum, as far as is known.

    Raises ValueError where a rule finds that it could not be taken out.
    """
    rule, mine = momentum_rule(optimizer), frozenset(parameters)
    return rule is not None and any(
        rule(group) for group in optimizer.param_groups if not mine.isdisjoint(group["params"])
    )


def with_rate_factor(
    group: Mapping[str, Any],
    values: Mapping[str, Any],
    factor: float,
    optimizer: Optimizer | None,
) -> dict[str, Any]:
    """Return the options of a step instead of `group`'s, `values`, with the rate times `factor`.

    Decoupled weight decay, which torch multiplies by the rate, stays what it was.
    """
    if factor == 1.0 or "lr" not in group:
        return dict(values)
    rate: Any = {**group, **values}["lr"]
    changed = {**values, "lr": factor * rate}
    if group.get("weight_decay") and decays_decoupled(group, optimizer):
        changed["weight_decay"] = group["weight_decay"] / factor
    return changed


class MomentumSwitch(StepSwitch):
    """Takes an optimizer's momentum out of its steps while it is `active`.

    Its groups hold the user's values at all times, and are read at every step. What the momentum
    has gathered is dropped whenever `active` changes, so that one that comes back starts with the
    first gradient then: SGD's buffer would be of long ago, and Adam's exp_avg is the last sparse
    gradient at full weight, which beta1 = 0.9 would apply nine times more.

    Args:
        optimizer: any torch optimizer. One that no rule is known for is left alone.
        parameters: those whose momentum is taken out.
        scale_rate: put what the momentum would have added up to into the rate; without it, for
            gradients that carry a momentum already, it scales SGD's weight decay alone.

    A step raises ValueError for a momentum that does not add up, one of 1 or more.

    rate_factor: by what a step multiplies the rate beside that; decoupled weight decay stays.
    """

    def __init__(
        self, optimizer: Optimizer, parameters: Iterable[Tensor], *, scale_rate: bool = True
    ) -> None:
        self._rule = momentum_rule(optimizer)
        self._scale_rate = scale_rate
        self.rate_factor = 1.0
        super().__init__(stepping(optimizer), parameters)

    def _values(self, group: ParamGroup) -> Mapping[str, Any]:
        values = {} if self._rule is None else dict(self._rule(group))
        if self._rule is not None and not self._scale_rate and "lr" in values:
            del values["lr"]
            if group.get("weight_decay"):
                # it has gone through the momentum as well, which no gradient brings along
                times = self._rule({**group, "lr": 1.0})["lr"]
                values["weight_decay"] = times * group["weight_decay"]
        return with_rate_factor(group, values, self.rate_factor, self._optimizer())

    def _changed_over(self) -> None:
        self.rate_factor = 1.0
        optimizer = self._optimizer()
        if optimizer is None or self._rule is None:
            return
        for param in self._parameters & optimizer.state.keys():
            state = optimizer.state[param]
            if isinstance(optimizer, torch.optim.SGD):
                # its own begins with the whole of a first gradient
                state.pop("momentum_buffer", None)
                continue
            for name in _MOMENTS.intersection(state):
                # others make it with the rest of their state, and never again
                if isinstance(state[name], Tensor):
                    state[name].zero_()

    def _stepped(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, torch.optim.RMSprop):
            return
        # made without momentum its state would lack what the user's own momentum looks for, here
        # or in a run that resumes from it
        for group in optimizer.param_groups:
            for param in self._parameters.intersection(group["params"]):
                state = optimizer.state.get(param)
                if state and group["momentum"] > 0:
                    state.setdefault("momentum_buffer", torch.zeros_like(param))


def _nothing(_: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def summed(group: Mapping[str, Any]) -> dict[str, Any]:
    """Take out the momentum of SGD and RMSprop, with nesterov or without: it has one sum."""
    momentum = group["momentum"]
    if momentum == 0:
        return {}
    if not momentum < 1:
        raise ValueError(
            f"momentum={momentum!r}: expected a number below 1, since the rate is divided by "
            "1 - momentum while gradients are sparse"
        )
    rate = group["lr"] * ((1 - group.get("dampening", 0)) / (1 - momentum))
    if not isinstance(rate, Tensor) and not math.isfinite(rate):
        raise ValueError(
            f"lr={group['lr']!r} with momentum={momentum!r}: expected a rate that is finite when "
            "divided by 1 - momentum"
        )
    without = {"nesterov": False} if "nesterov" in group else {}
    return {"momentum": 0.0, "lr": rate, **without}


def _normalised(group: Mapping[str, Any]) -> dict[str, Any]:
    """The momentum of Muon, whose update has one size whatever the momentum."""
    return {"momentum": 0.0} if group["momentum"] else {}


def _averaged(group: Mapping[str, Any]) -> dict[str, Any]:
    """The first moment of Adam and its kind."""
    beta1, beta2 = group["betas"]
    return {"betas": (0.0, beta2)} if beta1 else {}


class _Known(NamedTuple):
    rule: MomentumRule
    divides_by_mean_square: bool = False
    remembers_squares: bool = False


_KNOWN_OF_TORCH = {
    "SGD": _Known(summed),
    "RMSprop": _Known(summed, divides_by_mean_square=True, remembers_squares=True),
    "Adam AdamW NAdam RAdam": _Known(
        _averaged, divides_by_mean_square=True, remembers_squares=True
    ),
    "Adamax SparseAdam": _Known(_averaged, remembers_squares=True),
    "Muon": _Known(_normalised),
    "Adagrad Adadelta Adafactor": _Known(_nothing, remembers_squares=True),
    "ASGD LBFGS Rprop": _Known(_nothing),
}
# older torch lacks some of them
_known: dict[type[Optimizer], _Known] = {
    getattr(torch.optim, name): known
    for names, known in _KNOWN_OF_TORCH.items()
    for name in names.split()
    if hasattr(torch.optim, name)
}


def _known_of(kind: type) -> _Known | None:
    return next((_known[base] for base in kind.__mro__ if base in _known), None)

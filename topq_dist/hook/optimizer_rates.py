"""The rates of the optimizer that a hook was given, for the residuals that follow them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from topq_dist.compress.residual import Residuals
from topq_dist.compress.residual_rates import ResidualRates
from topq_dist.optim.groups import ParamGroup
from topq_dist.optim.momentum_rules import MomentumRule, momentum_rule, remembers_squares


class OptimizerRates:
    """Has residuals follow the rates of an optimizer.

    names: of the parameters. residuals: the hook's own. half: the names of those whose gradients
    are of float16. A rate that is no number, or lies on a GPU, which the host would have to wait
    for, is not known.
    """

    def __init__(
        self, names: Mapping[Tensor, str], residuals: Residuals, half: Collection[str] = ()
    ) -> None:
        self._names = names
        self._followed = ResidualRates(residuals, half)
        # of each group, and whose they are, as they were last followed
        self._seen: list[tuple[float | None, int, int]] = []

    def begin_step(self, optimizer: Optimizer | None) -> None:
        """Follow the rates of a step, with what the momentum adds up to; None: none of them."""
        groups = []
        if optimizer is not None:
            groups = [group for group in optimizer.param_groups if self._has_any(group)]
        rule = None if optimizer is None or not groups else momentum_rule(optimizer)
        seen = [
            (_rate_of(group, rule), id(group["params"]), len(group["params"])) for group in groups
        ]
        if seen == self._seen:
            return
        self._seen = seen
        if optimizer is None:
            return
        self._followed.follow(
            {
                self._names[parameter]: rate
                for group, (rate, *_) in zip(groups, seen, strict=True)
                for parameter in group["params"]
                if parameter in self._names
            },
            remembers_squares=remembers_squares(optimizer),
        )

    def _has_any(self, group: ParamGroup) -> bool:
        return any(parameter in self._names for parameter in group["params"])

    def state(self) -> dict[str, list[float]]:
        """See ResidualRates."""
        return self._followed.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See ResidualRates."""
        self._followed.load_state(state, self._names.values())
        self._seen = []


def _rate_of(group: ParamGroup, rule: MomentumRule | None) -> float | None:
    rate = group.get("lr")
    # a momentum that does not add up, and a rate that is none, are told of by the optimizer's step
    with contextlib.suppress(ValueError, TypeError):
        rate = rate if rule is None else rule(group).get("lr", rate)
    if isinstance(rate, Tensor):
        if rate.device.type != "cpu" or rate.numel() != 1:
            return None
        rate = rate.item()
    # of numpy too
    if not isinstance(rate, Real):
        return None
    with contextlib.suppress(OverflowError):
        number = float(rate)
        return number if 0 <= number < math.inf else None
    return None

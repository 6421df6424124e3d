"""What is kept back is applied at the rate of the step it came from, however late it is sent.

A residual of plain gradients would be applied at the rate of the step that sends it, so that a
schedule that falls loses of each gradient what fell while it waited. Sources: Stich et al.,
"Sparsified SGD with Memory" (NeurIPS 2018), algorithm 1, and Karimireddy et al., "Error Feedback
Fixes SignSGD" (ICML 2019), algorithm 2, whose memories hold rate times gradient. Here a residual is
multiplied by what the rate has changed by, which comes to the same.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from topq_dist.compress.residual import Residuals
from topq_dist.optim.groups import ParamGroup
from topq_dist.optim.momentum_rules import MomentumRule, momentum_rule

# a change that is too small for a pass over the residual
_LEAST_CHANGE = 1.05
# of the highest rate there was: a schedule that ends at nought would weigh the past without end
_LOWEST = 0.05


class ResidualRates:
    """The rates at which residuals are counted, by the parameters' names.

    names: of the parameters. residuals: the hook's own. A rate that is no positive number, or lies
    on a GPU, which the host would have to wait for, leaves a residual as it is.
    """

    def __init__(self, names: Mapping[Tensor, str], residuals: Residuals) -> None:
        self._names = names
        self._residuals = residuals
        # of each residual, and the highest of its parameter
        self._held: dict[str, tuple[float, float]] = {}
        # of each group and how many parameters it has, and of the parameters that are behind them
        self._rates: list[tuple[float | None, int]] = []
        self._to_follow: dict[str, float] = {}

    def begin_step(self, optimizer: Optimizer | None) -> None:
        """Take note of the rates of a step, with what the momentum adds up to; None: of none."""
        rule = None if optimizer is None else momentum_rule(optimizer)
        groups = [] if optimizer is None else optimizer.param_groups
        rates = [(_rate_of(group, rule), len(group["params"])) for group in groups]
        if rates == self._rates:
            return
        self._rates = rates
        self._to_follow = {
            self._names[parameter]: rate
            for group, (rate, _) in zip(groups, rates, strict=True)
            for parameter in group["params"]
            if rate is not None and parameter in self._names
        }

    def follow(self, names: Iterable[str]) -> None:
        """Have the residuals of these parameters be counted at the step's rates."""
        if not self._to_follow:
            return
        for name in names:
            now = self._to_follow.pop(name, None)
            if now is None:
                continue
            held, highest = self._held.get(name, (now, now))
            highest = max(highest, now)
            now = max(now, _LOWEST * highest)
            if not 1 / _LEAST_CHANGE < held / now < _LEAST_CHANGE:
                self._residuals.multiply(name, held / now)
                held = now
            self._held[name] = held, highest

    def state(self) -> dict[str, list[float]]:
        """Return the rates that the residuals are counted at, and the highest there were."""
        return {name: list(rates) for name, rates in self._held.items()}

    def check_state(self, state: Any) -> None:
        """Raise TypeError or ValueError for what `state` cannot have returned."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state has rates={state!r}: expected two numbers by name")
        for name, rates in state.items():
            if (
                not isinstance(rates, list | tuple)
                or len(rates) != 2
                or not all(isinstance(one, float) and 0 < one < math.inf for one in rates)
            ):
                raise ValueError(
                    f"state has rates[{name!r}]={rates!r}: expected two positive numbers"
                )

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` has returned and `check_state` let pass; no rate for what is absent.

        A residual without one is counted at that of the next step.
        """
        self._held = {name: (held, highest) for name, (held, highest) in state.items()}
        self._rates = []


def _rate_of(group: ParamGroup, rule: MomentumRule | None) -> float | None:
    rate = group.get("lr")
    # a momentum that does not add up is told of by the optimizer's step
    with contextlib.suppress(ValueError):
        rate = rate if rule is None else rule(group).get("lr", rate)
    if isinstance(rate, Tensor):
        if rate.device.type != "cpu" or rate.numel() != 1:
            return None
        rate = rate.item()
    if not isinstance(rate, int | float) or not 0 < rate < math.inf:
        return None
    return float(rate)

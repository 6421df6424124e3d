"""The rate of a residual: each gradient counts at that of its own step, whenever it is sent.

A residual of plain gradients would be applied at the rate of the step that sends it, so that a
schedule that falls loses of each gradient what fell while it waited. Sources: Stich et al.,
"Sparsified SGD with Memory" (NeurIPS 2018), algorithm 1, and Karimireddy et al., "Error Feedback
Fixes SignSGD" (ICML 2019), algorithm 2, whose memories hold rate times gradient. Here a residual is
multiplied by what the rate has changed by, which for SGD comes to the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from topq_dist.compress.residual import Residuals

# a change that is too small for a pass over the residual
_LEAST_CHANGE = 1.05
# of the highest rate there was: a schedule that ends at nought would weigh the past without end
_LOWEST = 0.05
# a fall at once by more: an optimizer that divides by the root of a mean of squares would take such
# arrivals into its mean, and step too short for as long as that remembers. A gradient of half
# precision might overflow by any
_SUDDEN = 1.5


class ResidualRates:
    """The rates at which residuals are counted, by the parameters' names.

    A rate of 0 counts as the lowest; while one is not known a residual is not counted at any.
    """

    def __init__(self, residuals: Residuals) -> None:
        self._residuals = residuals
        # of each residual, and the highest of its parameter
        self._held: dict[str, tuple[float, float]] = {}
        # as they were last changed, and those of the parameters that are behind
        self._rates: Mapping[str, float | None] = {}
        self._to_follow: dict[str, float | None] = {}
        self._most = math.inf

    def change(self, rates: Mapping[str, float | None], *, divides_by_mean_square: bool) -> None:
        """Take note of the rates from this step on, each with what its momentum adds up to.

        None: one that is not known. divides_by_mean_square: whether the optimizer does, by the root
        of it.
        """
        self._rates, self._to_follow = rates, dict(rates)
        self._most = _SUDDEN if divides_by_mean_square else math.inf

    def follow(self, names: Iterable[str], dtype: torch.dtype) -> None:
        """Have the residuals of these parameters be counted at the step's rates.

        dtype: of their gradients.
        """
        if not self._to_follow:
            return
        most = 1.0 if dtype == torch.float16 else self._most
        factors: dict[float, list[str]] = {}
        for name in names:
            if name not in self._to_follow:
                continue
            now = self._to_follow.pop(name)
            if now is None:
                self._held.pop(name, None)
                continue
            held, highest = self._held.get(name, (now, now))
            highest = max(highest, now)
            now = max(now, _LOWEST * highest)
            if now == 0:
                continue
            if not 1 / _LEAST_CHANGE < held / now < _LEAST_CHANGE:
                if held / now <= most:
                    factors.setdefault(held / now, []).append(name)
                held = now
            self._held[name] = held, highest
        for factor, alike in factors.items():
            self._residuals.multiply(alike, factor)

    def forget(self) -> None:
        """Have all residuals be counted at the rates of the next step, whatever waits in them."""
        self._held, self._to_follow = {}, dict(self._rates)

    def state(self) -> dict[str, list[float]]:
        """Return the rates that the residuals are counted at, and the highest there were."""
        return {name: list(rates) for name, rates in self._held.items()}

    def load_state(self, state: Mapping[str, Any], names: Iterable[str]) -> None:
        """Take up what `state` has returned and check_rates let pass, of parameters of `names`.

        A residual without a rate is counted at that of the next step.
        """
        known = set(names)
        self._held = {name: (one[0], one[1]) for name, one in state.items() if name in known}
        self._rates, self._to_follow = {}, {}


def check_rates(state: Any) -> None:
    """Raise TypeError or ValueError for what ResidualRates.state cannot have returned."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state has rates={state!r}: expected two numbers by name")
    for name, rates in state.items():
        if (
            not isinstance(rates, list | tuple)
            or len(rates) != 2
            or not all(isinstance(one, float) and 0 < one < math.inf for one in rates)
            # or what it is multiplied by would have no bound
            or rates[0] > rates[1]
        ):
            raise ValueError(
                f"state has rates[{name!r}]={rates!r}: expected two positive numbers, the second "
                "the highest there was"
            )

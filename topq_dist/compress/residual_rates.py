"""The rate of a residual: each gradient counts at that of its own step, whenever it is sent.

A residual of plain gradients would be applied at the rate of the step that sends it, so that a
schedule that falls loses of each gradient what fell while it waited. Sources: Stich et al.,
"Sparsified SGD with Memory" (NeurIPS 2018), algorithm 1, and Karimireddy et al., "Error Feedback
Fixes SignSGD" (ICML 2019), algorithm 2, whose memories hold rate times gradient. Here a residual is
multiplied by what the rate has changed by, which for SGD comes to the same.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from topq_dist.compress.residual import Residuals

# a change that is too small for a pass over the residual
_LEAST_CHANGE = 1.05
# of the highest rate there was: a schedule that ends at nought would weigh the past without end
_LOWEST = 0.05
# a fall at once by more: an optimizer that remembers squares of gradients would take such arrivals
# into them, and step too short for as long as it does. A gradient of half precision might overflow
# by any
_SUDDEN = 1.5
# a rate below is none: parts of it, and what is divided by them, are numbers no more
_NOUGHT = 1e-300


class _Counted(NamedTuple):
    """How a parameter's residual is counted.

    rate: of the step that it last followed. at: the rate at which it has the size that it has,
    above `rate` by as much as it has not followed. highest: of all rates there were.
    """

    rate: float
    at: float
    highest: float

    def following(self, rate: float, largest_factor: float) -> tuple[_Counted, float]:
        """Return the residual at another rate, and the factor that brings it there.

        largest_factor: which a fall may ask for and be followed.
        """
        highest = max(self.highest, rate)
        rate = max(rate, _LOWEST * highest)
        if self.rate == 0:
            # what came in at nought has never counted
            return _Counted(rate, rate, highest), _LOWEST if rate else 1.0
        fall = self.rate / rate
        if 1 / _LEAST_CHANGE < fall < _LEAST_CHANGE:
            return self._replace(highest=highest), 1.0
        if fall > largest_factor:
            return _Counted(rate, self.at, highest), 1.0
        # what was not followed downwards is not followed up again
        at = max(rate, self.at / fall if fall > 1 else self.at)
        return _Counted(rate, at, highest), self.at / at


class ResidualRates:
    """The rates at which residuals are counted, by the parameters' names.

    half: parameters whose gradients are of float16. may_be_refused: a step's rates are those of its
    residuals only once they are accepted, and `take_back` can be called until then. While a rate is
    not known, a residual is not counted at any.
    """

    def __init__(
        self, residuals: Residuals, half: Collection[str] = (), *, may_be_refused: bool = False
    ) -> None:
        self._residuals = residuals
        self._half = frozenset(half)
        self._may_be_refused = may_be_refused
        self._counted: dict[str, _Counted] = {}
        # as they were last followed
        self._rates: Mapping[str, float | None] = {}
        # what was before that: how residuals were counted, and each factor with what it was for
        self._before: dict[str, _Counted] | None = None
        self._copies: list[tuple[float, dict[str, Tensor]]] = []

    def follow(self, rates: Mapping[str, float | None], *, remembers_squares: bool) -> None:
        """Have residuals be counted at the rates of this step, None where one is not known.

        rates: with what momentum adds up to, of all parameters that have one, whether or not
        anything waits for them here. remembers_squares: whether the optimizer does; it is spared
        sudden arrivals.
        """
        if rates == self._rates:
            return
        self._rates = rates
        if self._may_be_refused:
            self._before, self._copies = dict(self._counted), []
        largest_factor = _SUDDEN if remembers_squares else math.inf
        factors: dict[float, list[str]] = {}
        for name, rate in rates.items():
            if rate is None:
                self._counted.pop(name, None)
                continue
            rate = 0.0 if rate < _NOUGHT else rate
            if name not in self._counted:
                self._counted[name] = _Counted(rate, rate, rate)
                continue
            self._counted[name], factor = self._counted[name].following(
                rate, 1.0 if name in self._half else largest_factor
            )
            if factor != 1.0:
                factors.setdefault(factor, []).append(name)
        for factor, alike in factors.items():
            if self._may_be_refused:
                # what is added meanwhile is not to be undone, so that to divide again will not do
                self._copies.append((factor, self._residuals.copies(alike)))
            self._residuals.multiply(alike, factor)

    def accept(self) -> None:
        """Let the rates that were last followed stay."""
        self._before, self._copies = None, []

    def take_back(self, decay: float) -> None:
        """Undo the last `follow`, unless it was accepted, for what waited before it alone.

        decay: what residuals have been multiplied by since.
        """
        if self._before is None:
            return
        for factor, copies in self._copies:
            self._residuals.add(copies, decay * (1.0 - factor))
        self._counted, self._rates = self._before, {}
        self.accept()

    def counted_at(self, names: Iterable[str]) -> list[float]:
        """Return the rate that the residual of each parameter is counted at, 0 where at none.

        A rate of nought is 1e-300, to be told from none.
        """
        return [
            max(self._counted[name].at, _NOUGHT) if name in self._counted else 0.0 for name in names
        ]

    def factors_since(self, names: Iterable[str], counted_at: Iterable[float]) -> list[float]:
        """Return what brings values that were counted at such rates to what counts now.

        counted_at: of each parameter, as `counted_at` has returned it. 1 where either is not known,
        or nothing counts now.
        """
        return [
            min(max(then / now, _LOWEST), 1 / _LOWEST) if then and now > _NOUGHT else 1.0
            for then, now in zip(counted_at, self.counted_at(names), strict=True)
        ]

    def forget(self) -> None:
        """Have all residuals be counted at the rates of the next step, whatever waits in them."""
        self._counted, self._rates = {}, {}
        self.accept()

    def state(self) -> dict[str, list[float]]:
        """Return what `load_state` takes: three numbers of each parameter, as _Counted has them."""
        return {name: list(counted) for name, counted in self._counted.items()}

    def load_state(self, state: Mapping[str, Any], names: Iterable[str]) -> None:
        """Take up what `state` has returned and check_rates let pass, of parameters of `names`.

        A residual without a rate is counted at that of the next step.
        """
        known = set(names)
        self._counted = {name: _read(one) for name, one in state.items() if name in known}
        self._rates = {}
        self.accept()


def check_rates(state: Any) -> None:
    """Raise TypeError or ValueError for what ResidualRates.state cannot have returned."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state has rates={state!r}: expected three numbers by name")
    for name, numbers in state.items():
        if (
            not isinstance(numbers, list | tuple)
            or len(numbers) not in (2, 3)
            or not all(isinstance(one, float) for one in numbers)
            or not _can_be(_read(numbers))
        ):
            raise ValueError(
                f"state has rates[{name!r}]={numbers!r}: expected the last rate, the one that a "
                "residual is counted at and the highest there was, none above the one behind it"
            )


def _read(numbers: Sequence[float]) -> _Counted:
    # states of before lack the second
    return _Counted(numbers[0], numbers[-2], numbers[-1])


def _can_be(counted: _Counted) -> bool:
    rate, at, highest = counted
    # beyond, what a residual is multiplied by would have no bound
    return rate <= at <= highest < math.inf and (rate >= _LOWEST * _NOUGHT or rate == highest == 0)

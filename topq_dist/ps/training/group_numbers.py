"""The numbers of the inner optimizer's groups that workers may set: rate, momentum, weight decay.

Each worker has a schedule of its own, and one that joins late, or has gone wrong, may be elsewhere
on it than the others. The median of what the workers of a version say counts: where most agree,
nobody rules the others' gradients.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from topq_dist.ps.protocol.errors import InvalidError, NonFiniteError
from topq_dist.ps.protocol.types import Push, group_momentum, set_group_momentum
from topq_dist.ps.training.step_guard import StepScale

_log = logging.getLogger(__name__)
# of the workers that a message names
_MOST_NAMED = 4
_PLURALS = {"lr": "learning rates", "momentum": "momenta", "weight_decay": "weight decays"}
_HIGHEST_USUAL_BETA = 0.99
Numbers = tuple[float, ...]
Group = Mapping[str, Any]


class GroupNumbers:
    """Checks the numbers of pushes, and makes them the optimizer's."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self._inner = inner
        groups = inner.param_groups
        self._have_momentum = all(group_momentum(group) is not None for group in groups)
        self.have_weight_decay = all("weight_decay" in group for group in groups)
        self._own = [dict(group) for group in groups]
        self._warned = False

    def check(self, push: Push, *, max_lr: float = math.inf) -> None:
        """Raise InvalidError or NonFiniteError unless `take` can take the push's numbers.

        max_lr: the highest rate, for the run's own momentum where a higher one multiplies it.
        Infinity leaves out what one worker may ask for, and others have to bear.
        """
        self._check_given("lr", push.lr, there=True)
        self._check_given("momentum", push.momentum, there=self._have_momentum)
        self._check_given("weight_decay", push.weight_decay, there=self.have_weight_decay)
        if math.isfinite(max_lr) and (push.lr or push.momentum or push.weight_decay):
            _check_highest(push.lr, max_lr)
            for place, own in enumerate(self._own):
                now = self._inner.param_groups[place]
                given = _with_given(now, push, place)
                _check_reach(given, now, own, max_lr)
                self._check_correction(given, now, own, max_lr)

    def _check_correction(self, given: Group, now: Group, own: Group, max_lr: float) -> None:
        """Raise InvalidError for a beta1 that lengthens a step of Adam's kind far beyond `max_lr`.

        Its average is divided by 1 - beta1 ** steps as though each step had had the beta1 of this
        one: after a low one, 1 - 1e-9 divides by next to nothing (Kingma and Ba 2015, section 3).
        The groups are those of `_check_reach`. What a usual schedule of beta1 does is let be.
        """
        if "betas" not in given:
            return
        beta, usual = given["betas"][0], max(own["betas"][0], _HIGHEST_USUAL_BETA)
        brings = beta > now["betas"][0] or given["lr"] > max(now["lr"], own["lr"])
        if not brings or beta <= usual:
            return
        most_lr = max(group["lr"] for group in (given, now, own))
        # where no step has been taken yet, one may come before this push is applied
        steps = max(2, self._fewest_steps(now["params"]))
        if most_lr / (1.0 - beta**steps) > max_lr / (1.0 - usual**2):
            raise InvalidError(
                f"beta1={beta!r} at lr={most_lr!r} and step {steps}: expected a step no longer "
                f"than this server's max_lr={max_lr:g} makes it with beta1={usual:g} at step 2"
            )

    def _fewest_steps(self, params: Iterable[torch.Tensor]) -> int:
        """Return the fewest steps that the next is of any tensor with a state; 0 where none has."""
        states = [self._inner.state[param] for param in params if param in self._inner.state]
        return min((int(state["step"]) + 1 for state in states if "step" in state), default=0)

    def _check_given(self, name: str, given: Numbers, *, there: bool) -> None:
        if not given:
            return
        if not there:
            raise InvalidError(
                f"{len(given)} {_PLURALS[name]}: expected none, {type(self._inner).__name__} has "
                f"no {name}"
            )
        if len(given) != len(self._inner.param_groups):
            raise InvalidError(
                f"{len(given)} {_PLURALS[name]}: expected one for each of "
                f"{len(self._inner.param_groups)} groups, or none"
            )
        for number in given:
            if not math.isfinite(number):
                raise NonFiniteError(f"{name}={number!r}: expected a finite number")
            if number < 0 or (name == "momentum" and number >= 1):
                expected = "a number in [0, 1)" if name == "momentum" else "0 or more"
                raise InvalidError(f"{name}={number!r}: expected {expected}")

    def scale(self, pushes: Sequence[Push]) -> StepScale:
        """Return the largest numbers of a step with those of these pushes, or of now."""
        groups = self._inner.param_groups
        return StepScale.of(
            [group["lr"] for group in groups] + [lr for push in pushes for lr in push.lr],
            [group_momentum(group) or 0.0 for group in groups]
            + [momentum for push in pushes for momentum in push.momentum],
            [group.get("weight_decay", 0.0) for group in groups]
            + [decay for push in pushes for decay in push.weight_decay],
        )

    def take(self, pushes: Sequence[Push]) -> str:
        """Set each number to the median of those that pushes have; leave what none has.

        Returns where they differ, or some have none of one that changes, for people; nothing where
        they agree.
        """
        differing = []
        for name in _PLURALS:
            said: list[Numbers] = [getattr(push, name) for push in pushes]
            given = [numbers for numbers in said if numbers]
            if not given:
                continue
            before, numbers = self._numbers(name), medians(given)
            for group, number in zip(self._inner.param_groups, numbers, strict=True):
                if name == "momentum":
                    set_group_momentum(group, number)
                else:
                    group[name] = number
            silent = len(given) < len(said) and numbers != before
            if silent or len(set(given)) > 1:
                place = _first_difference(given, before, numbers)
                what = _said([push.worker for push in pushes], said, place)
                median = f"the median, {numbers[place]:g}, counts"
                differing.append(f"{name} of group {place}: {what}; {median}")
        disagreement = "; ".join(differing)
        if disagreement and not self._warned:
            self._warned = True
            _log.warning("the workers of a version do not agree: %s", disagreement)
        return disagreement

    def _numbers(self, name: str) -> Numbers:
        groups = self._inner.param_groups
        if name == "momentum":
            return tuple(group_momentum(group) or 0.0 for group in groups)
        return tuple(float(group[name]) for group in groups)


def _with_given(group: Group, push: Push, place: int) -> dict[str, Any]:
    """Return a group as it would be if the push's numbers counted."""
    given = dict(group)
    if push.lr:
        given["lr"] = push.lr[place]
    if push.momentum:
        set_group_momentum(given, push.momentum[place])
    if push.weight_decay:
        given["weight_decay"] = push.weight_decay[place]
    return given


def _check_highest(rates: Numbers, max_lr: float) -> None:
    for lr in rates:
        if lr > max_lr:
            raise InvalidError(
                f"lr={lr!r}: expected at most {max_lr:g}, which is this server's max_lr"
            )


def _check_reach(given: Group, now: Group, own: Group, max_lr: float) -> None:
    """Raise InvalidError for a step longer than `max_lr` makes it, or one that inverts weights.

    given: the group with a push's numbers. now: without. own: as the run began. The other workers'
    medians may put a number beside their own rates, so that a low one of the push excuses nothing;
    and what is no higher than it was is nothing that the push has brought.
    """
    before, groups = (now, own), (given, now, own)
    momentum, own_momentum, decay = _momentum(given), _momentum(own), _decay(given)
    brings_lr = given["lr"] > max(now["lr"], own["lr"])
    brings_momentum = momentum > max(_momentum(now), own_momentum)
    brings_decay = decay > max(map(_decay, before))
    if not (brings_lr or brings_momentum or brings_decay):
        return
    most_lr = max(group["lr"] for group in groups)
    rate = most_lr / (1.0 - momentum)
    moves_further = momentum > own_momentum and (brings_lr or brings_momentum)
    if moves_further and rate * (1.0 - own_momentum) > max_lr:
        raise InvalidError(
            f"momentum={momentum!r} at lr={most_lr!r}: expected steps no longer than this server's "
            f"max_lr={max_lr:g} makes them with momentum={own_momentum:g}, as its run began"
        )
    lr = most_lr
    if not brings_momentum:
        fastest = max(groups, key=_summed_rate)
        lr, rate = fastest["lr"], _summed_rate(fastest)
    most = max(1.0, _summed_rate(own) * _decay(own))
    if rate * decay > most:
        raise InvalidError(
            f"lr={lr!r} with weight_decay={decay!r} is a decay of {rate * decay:g} a step: "
            f"expected at most {most:g}, beyond which a step turns weights round"
        )


def _momentum(group: Group) -> float:
    return float(group.get("momentum", 0.0))


def _decay(group: Group) -> float:
    return float(group.get("weight_decay", 0.0))


def _summed_rate(group: Group) -> float:
    """Return how far a gradient comes to move the parameters, momentum included."""
    return float(group["lr"] / (1.0 - _momentum(group)))


def medians(given: Sequence[Numbers]) -> Numbers:
    """Return, group by group, the median of what several workers say; of two, their mean."""
    if all(one == given[0] for one in given):
        return given[0]
    return tuple(_median(sorted(numbers)) for numbers in zip(*given, strict=True))


def _median(ascending: Sequence[float]) -> float:
    low, high = ascending[(len(ascending) - 1) // 2], ascending[len(ascending) // 2]
    return low if low == high else low / 2 + high / 2  # the sum of large ones is infinite


def _first_difference(given: Sequence[Numbers], before: Numbers, numbers: Numbers) -> int:
    """Return the first group for which workers differ, or else that is another than before."""
    differing = [n for n, each in enumerate(zip(*given, strict=True)) if len({*each}) > 1]
    changed = [n for n, number in enumerate(numbers) if number != before[n]]
    return (differing or changed)[0]


def _said(workers: Sequence[str], said: Sequence[Numbers], place: int) -> str:
    words = [
        f"{worker} sent {f'{numbers[place]:g}' if numbers else 'none'}"
        for worker, numbers in zip(workers, said, strict=True)
    ]
    more = [f"and {len(words) - _MOST_NAMED} more"] if len(words) > _MOST_NAMED else []
    return ", ".join(words[:_MOST_NAMED] + more)

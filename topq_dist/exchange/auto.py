"""Choosing an exchange by what it costs here, measured in the first steps, alike on all ranks."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist

from topq_dist.exchange.base import Exchange, ExchangeWork, Outgoing, SwitchingExchange
from topq_dist.exchange.collectives import CommContext
from topq_dist.exchange.rehearsal import Rehearsal
from topq_dist.exchange.shards import check_same_on_all_shards

_log = logging.getLogger(__name__)
# DDP rebuilds its buckets, memory is touched for the first time, slots and thresholds adapt
_WARM_UP_STEPS = 3
# of the others: the first steps after a switch still bear its cost, a few say whether to go on
_SETTLING_STEPS = 2
_FEW_STEPS = 2
_STEPS = 8
_HOPELESS = 2.0
# nearer than this two times are taken as equal, and fewer bytes win. Among sparse exchanges bytes
# weigh more: these times are of one quiet moment, and the link is what others share
_ALIKE = 1.05
_ALIKE_SPARSE = 1.25
_DENSE = "dense"
_WHY_DENSE = "over 5 % faster than every sparse one"
_WHY_SPARSE = (
    "of fewest bytes among the sparse ones not over 25 % slower than the fastest, dense not being "
    "over 5 % faster"
)


@dataclass(kw_only=True)
class _Trial:
    """Steps of one exchange. aside_s, aside_bytes: what of the step under way is not its own.

    reduce_s: seconds in the all-reduces behind it; of each step, and of the one under way.
    """

    name: str
    exchange: Exchange
    skip: int = _SETTLING_STEPS
    steps: int = _STEPS
    step_s: list[float] = field(default_factory=list)
    wire_bytes: list[int] = field(default_factory=list)
    reduce_s: list[float] = field(default_factory=list)
    aside_s: float = 0.0
    aside_bytes: int = 0
    reducing_s: float = 0.0


class _Cost(NamedTuple):
    """A step of one exchange; wire_bytes: nan where it has been seen behind another alone."""

    step_s: float
    wire_bytes: float
    reduce_s: float = 0.0

    def text(self) -> str:
        if math.isnan(self.wire_bytes):
            return f"at least {1e3 * self.step_s:.1f} ms a step"
        return f"{1e3 * self.step_s:.1f} ms a step, {self.wire_bytes / 1e6:.3g} MB"


class Auto(SwitchingExchange):
    """Try each exchange for a few whole steps, then keep the cheapest.

    What counts is the median time from one backward pass to the next, compute and all, on the
    slowest rank. "dense" is kept where it is more than 5 % faster than every other; if not, of the
    others within 25 % of the fastest, the one that puts the fewest bytes on the link.

    Until then training is that of "dense", to the bit: a sparse exchange is rehearsed, with
    residuals of its own that are thrown away, and the gradient all-reduced behind it, which does
    not count. Each has up to eleven steps, four or five where the all-reduce, or the exchange
    itself, takes over twice as long as the best.

    exchanges: by name, the first to be tried first; one of them is gone on with. rehearsals: the
    same once more, each with a compressor of its own.
    """

    def __init__(
        self,
        context: CommContext,
        exchanges: Mapping[str, Exchange],
        rehearsals: Mapping[str, Exchange],
    ) -> None:
        self._context = context
        self._exchanges = dict(exchanges)
        self._left = [_Trial(name=name, exchange=exchange) for name, exchange in rehearsals.items()]
        self._dense = rehearsals.get(_DENSE)
        self._costs: dict[str, _Cost] = {}
        self._began_s: float | None = None
        self._wire_bytes_before = 0
        self._chosen: str | None = None
        self._resumed: str | None = None
        self._told = False
        self._first = len(exchanges) > 1
        self._trial: _Trial | None = self._left.pop(0)
        self._trial.skip = _WARM_UP_STEPS
        self._current = self._trial.exchange
        if not self._left:
            self._choose(self._trial.name)

    @property
    def chosen(self) -> str | None:  # type: ignore[override]
        return self._resumed or self._chosen

    def settings(self) -> str:
        return f"resumed exchange={self._resumed}"

    def can_choose(self, chosen: str | None) -> bool:
        return chosen is None or chosen in self._exchanges

    def check_chosen(self, chosen: str | None) -> None:
        if not self.can_choose(chosen):
            known = ", ".join(self._exchanges)
            raise ValueError(f"state has chosen_exchange={chosen!r}: expected one of {known}")

    def resume(self, chosen: str | None, dense_steps: int) -> None:
        for exchange in self._exchanges.values():
            # what has not been chosen is tried anew, and a trial flushes nothing
            exchange.resume(None, 0 if chosen is None else dense_steps)
        if len(self._exchanges) > 1:
            self._resumed = chosen

    def _take_up_resumed(self) -> None:
        """Go over to the exchange of a loaded state, once every rank is known to have loaded it.

        Ranks in different exchanges would wait for each other. Before the first step all of them
        ask; later, the settings of one more step in the old exchange tell.
        """
        if self._first:
            check_same_on_all_shards(self.settings(), self._context)
        told, self._told = self._first or self._told, self._resumed is not None
        self._first = False
        if told and self._resumed is not None:
            self._choose(self._resumed)
            self._resumed, self._told = None, False

    def _choose(self, name: str) -> None:
        self._current = self._exchanges[name]
        self._chosen = name
        # with what they have kept
        self._trial, self._left, self._dense = None, [], None

    @property
    def sparse(self) -> bool:  # type: ignore[override]
        return self._trial is None and self._current.sparse

    @property
    def dense_steps(self) -> int:  # type: ignore[override]
        return self._exchanges[_DENSE].dense_steps if _DENSE in self._exchanges else 0

    def launch(self, outgoing: Outgoing) -> ExchangeWork:
        if self._trial is None or self._dense is None or self._current is self._dense:
            return self._current.launch(outgoing)
        with self._aside(self._trial):
            gradient = outgoing.bucket.clone()
        work = self._current.launch(outgoing)
        return Rehearsal(work, outgoing, gradient, self._dense, self._reducing(self._trial))

    @contextmanager
    def _aside(self, trial: _Trial) -> Iterator[None]:
        """Leave what is done in the block out of the trial's account."""
        began_s, before = self._now_s(), self._context.meter.stats.wire_bytes
        yield
        trial.aside_s += self._now_s() - began_s
        trial.aside_bytes += self._context.meter.stats.wire_bytes - before

    @contextmanager
    def _reducing(self, trial: _Trial) -> Iterator[None]:
        before_s = trial.aside_s
        with self._aside(trial):
            yield
        trial.reducing_s += trial.aside_s - before_s

    def _now_s(self) -> float:
        if self._context.device.type == "cuda":
            torch.cuda.synchronize(self._context.device)
        return time.perf_counter()

    def begin_step(self) -> None:
        """Account for the step that has ended, and go on to the next trial or decide."""
        self._take_up_resumed()
        if self._trial is not None:
            self._account(self._trial)
        self._current.begin_step()

    def _account(self, trial: _Trial) -> None:
        now_s, wire_bytes = self._now_s(), self._context.meter.stats.wire_bytes
        if self._began_s is not None:
            if trial.skip:
                trial.skip -= 1
            else:
                trial.step_s.append(now_s - self._began_s - trial.aside_s)
                trial.wire_bytes.append(wire_bytes - self._wire_bytes_before - trial.aside_bytes)
                trial.reduce_s.append(trial.reducing_s)
        trial.aside_s, trial.aside_bytes, trial.reducing_s = 0.0, 0, 0.0
        taken = len(trial.step_s)
        if taken == trial.steps or (taken == _FEW_STEPS and self._is_decided(trial)):
            self._conclude(trial)
            # agreeing and choosing are no part of the next step
            now_s = self._now_s()
        self._began_s, self._wire_bytes_before = now_s, wire_bytes

    def _is_decided(self, trial: _Trial) -> bool:
        """Return whether a few steps say enough of this exchange, or of "dense" behind it."""
        cost = self._agreed_cost(trial)
        if any(cost.step_s > _HOPELESS * other.step_s for other in self._costs.values()):
            return True
        if trial.exchange.sparse and cost.reduce_s > _HOPELESS * cost.step_s:
            # every further step would take as long
            self._costs[_DENSE] = _Cost(cost.reduce_s, math.nan)
            self._left = [left for left in self._left if left.name != _DENSE]
        return _DENSE in self._costs

    def _agreed_cost(self, trial: _Trial) -> _Cost:
        mine = [
            statistics.median(trial.step_s),
            statistics.median(trial.wire_bytes),
            -statistics.median(trial.reduce_s),
        ]
        cost = torch.tensor(mine, dtype=torch.float64, device=self._context.device)
        # the slowest rank sets the pace, but in an all-reduce the last one to come has waited for
        # nobody; and every rank must decide on the same numbers
        dist.all_reduce(cost, dist.ReduceOp.MAX, group=self._context.group)
        if self._context.shards is not None:
            dist.all_reduce(cost, dist.ReduceOp.MAX, group=self._context.shards)
        step_s, wire_bytes, reduce_s = cost.tolist()
        return _Cost(step_s, wire_bytes, -reduce_s)

    def _conclude(self, trial: _Trial) -> None:
        self._costs[trial.name] = self._agreed_cost(trial)
        if self._left:
            self._trial = self._left.pop(0)
            self._current = self._trial.exchange
            return
        chosen = _cheapest(self._costs)
        self._choose(chosen)
        if self._context.rank == 0:
            costs = "; ".join(f"{name} {cost.text()}" for name, cost in self._costs.items())
            why = _WHY_DENSE if chosen == _DENSE else _WHY_SPARSE
            _log.info("exchange %s chosen, %s: %s", chosen, why, costs)


def _cheapest(costs: Mapping[str, _Cost]) -> str:
    sparse = {name: cost for name, cost in costs.items() if name != _DENSE}
    best_s = min(cost.step_s for cost in sparse.values())
    if _DENSE in costs and _ALIKE * costs[_DENSE].step_s < best_s:
        return _DENSE
    alike = [name for name, cost in sparse.items() if cost.step_s <= _ALIKE_SPARSE * best_s]
    return min(alike, key=lambda name: sparse[name].wire_bytes)

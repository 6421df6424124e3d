"""Choosing an exchange by what it costs here, measured in the first steps, alike on all ranks."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from topq_dist.compress.compressor import Compressed
from topq_dist.compress.layout import Layout
from topq_dist.exchange.agreement import check_same_on_all_ranks
from topq_dist.exchange.base import Exchange, ExchangeWork
from topq_dist.exchange.collectives import CommContext

_log = logging.getLogger(__name__)
# DDP rebuilds its buckets, memory is touched for the first time, slots and thresholds adapt
_WARM_UP_STEPS = 4
_FIRST_STEPS = 20
# of the others: the first steps after a switch still bear its cost, a few say whether to go on
_SETTLING_STEPS = 2
_FEW_STEPS = 2
_STEPS = 8
TRIAL_STEPS = _SETTLING_STEPS + _STEPS
_HOPELESS = 2.0
# nearer than this two times are taken as equal, and fewer bytes win. Among sparse exchanges bytes
# weigh more: these times are of one quiet moment, and the link is what others share
_ALIKE = 1.05
_ALIKE_SPARSE = 1.25
_DENSE = "dense"


@dataclass(kw_only=True)
class _Trial:
    name: str
    exchange: Exchange
    skip: int
    steps: int
    step_s: list[float] = field(default_factory=list)
    wire_bytes: list[int] = field(default_factory=list)


class _Cost(NamedTuple):
    step_s: float
    wire_bytes: float


class Auto(Exchange):
    """Try each exchange for a few whole steps, then keep the cheapest.

    What counts is the median time from one backward pass to the next, compute and all, on the
    slowest rank. "dense" is kept where it is more than 5 % faster than every other; if not, of the
    others within 25 % of the fastest, the one that puts the fewest bytes on the link.

    Steps 1 to 24 are the first exchange's; then each of the others has ten, or four where these
    take over twice as long as the best before.
    """

    def __init__(self, context: CommContext, exchanges: Mapping[str, Exchange]) -> None:
        self._context = context
        self._left = [
            _Trial(name=name, exchange=exchange, skip=_SETTLING_STEPS, steps=_STEPS)
            for name, exchange in exchanges.items()
        ]
        self._exchanges = dict(exchanges)
        self._trial = self._left.pop(0)
        self._trial.skip, self._trial.steps = _WARM_UP_STEPS, _FIRST_STEPS
        self._costs: dict[str, _Cost] = {}
        self._exchange = self._trial.exchange
        self._began_s: float | None = None
        self._wire_bytes_before = 0
        self._chosen: str | None = None
        self._resumed: str | None = None
        self._told = False
        self._first = bool(self._left)
        if not self._left:
            self._chosen = self._trial.name

    @property
    def chosen(self) -> str | None:  # type: ignore[override]
        return self._resumed or self._chosen

    def settings(self) -> str:
        return f"resumed exchange={self._resumed}"

    def check_chosen(self, chosen: str | None) -> None:
        if chosen is not None and chosen not in self._exchanges:
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
            check_same_on_all_ranks(
                self.settings(), group=self._context.group, device=self._context.device
            )
        told, self._told = self._first or self._told, self._resumed is not None
        self._first = False
        if told and self._resumed is not None:
            self._choose(self._resumed)
            self._resumed, self._told = None, False

    def _choose(self, name: str) -> None:
        self._exchange = self._exchanges[name]
        self._chosen = name

    @property
    def carries_settings(self) -> bool:  # type: ignore[override]
        return self._exchange.carries_settings

    @property
    def sparse(self) -> bool:  # type: ignore[override]
        return self._exchange.sparse

    @property
    def dense_steps(self) -> int:  # type: ignore[override]
        return self._exchanges[_DENSE].dense_steps if _DENSE in self._exchanges else 0

    @property
    def frames_per_bucket(self) -> int:  # type: ignore[override]
        return self._exchange.frames_per_bucket

    def prepare(self, bucket: Tensor) -> None:
        self._exchange.prepare(bucket)

    def launch(
        self,
        bucket: Tensor,
        layout: Layout,
        compressed: Compressed | None,
        *,
        settings_digest: int,
    ) -> ExchangeWork:
        return self._exchange.launch(bucket, layout, compressed, settings_digest=settings_digest)

    def begin_step(self) -> None:
        """Account for the step that has ended, and go on to the next trial or decide."""
        self._take_up_resumed()
        if self._chosen is None:
            self._account()
        self._exchange.begin_step()

    def _account(self) -> None:
        now_s, wire_bytes = time.perf_counter(), self._context.meter.stats.wire_bytes
        trial = self._trial
        if self._began_s is not None:
            if trial.skip:
                trial.skip -= 1
            else:
                trial.step_s.append(now_s - self._began_s)
                trial.wire_bytes.append(wire_bytes - self._wire_bytes_before)
        taken = len(trial.step_s)
        if taken == trial.steps or (taken == _FEW_STEPS and self._is_hopeless()):
            self._conclude()
            # agreeing and choosing are no part of the next step
            now_s = time.perf_counter()
        self._began_s, self._wire_bytes_before = now_s, wire_bytes

    def _is_hopeless(self) -> bool:
        if not self._costs:
            return False
        best_s = min(cost.step_s for cost in self._costs.values())
        return self._agreed_cost().step_s > _HOPELESS * best_s

    def _agreed_cost(self) -> _Cost:
        mine = [statistics.median(self._trial.step_s), statistics.median(self._trial.wire_bytes)]
        cost = torch.tensor(mine, dtype=torch.float64, device=self._context.device)
        # the slowest rank sets the pace, and every rank must decide on the same numbers
        dist.all_reduce(cost, dist.ReduceOp.MAX, group=self._context.group)
        return _Cost(*cost.tolist())

    def _conclude(self) -> None:
        self._costs[self._trial.name] = self._agreed_cost()
        if self._left:
            self._trial = self._left.pop(0)
            self._exchange = self._trial.exchange
            return
        self._choose(_cheapest(self._costs))
        if self._context.rank == 0:
            costs = [
                f"{name} {1e3 * cost.step_s:.1f} ms a step, {cost.wire_bytes / 1e6:.3g} MB"
                for name, cost in self._costs.items()
            ]
            _log.info("exchange %s chosen: %s", self.chosen, "; ".join(costs))


def _cheapest(costs: Mapping[str, _Cost]) -> str:
    sparse = {name: cost for name, cost in costs.items() if name != _DENSE}
    best_s = min(cost.step_s for cost in sparse.values())
    if _DENSE in costs and _ALIKE * costs[_DENSE].step_s < best_s:
        return _DENSE
    alike = [name for name, cost in sparse.items() if cost.step_s <= _ALIKE_SPARSE * best_s]
    return min(alike, key=lambda name: sparse[name].wire_bytes)

"""Choosing an exchange by what it costs here, measured in the first steps, alike on all ranks."""

from __future__ import annotations

import logging
import statistics
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from topq_dist.ddp.exchange import Exchange, Job, Link, Pending

_log = logging.getLogger(__name__)
# DDP rebuilds its buckets, memory is touched for the first time, slots and thresholds settle
_WARM_UP_STEPS = 4
_FIRST_STEPS = 20
_STEPS = 8
# the first steps after a switch still pay for it
_SETTLING_STEPS = 2


@dataclass
class _Trial:
    name: str
    exchange: Exchange
    step_s: list[float] = field(default_factory=list)
    wire_bytes: list[int] = field(default_factory=list)


class Auto:
    """Try each exchange for a few whole steps, then keep the cheapest.

    `sparse` are compared by the bytes they put on a link, and the best of them with `dense` by
    the median time from one backward pass to the next, compute and all, of the slowest rank.
    Steps 1 to 24 are the first sparse exchange's; then each of the others has eight.
    """

    def __init__(self, link: Link, sparse: dict[str, Exchange], dense: dict[str, Exchange]) -> None:
        self._link = link
        self._trials = [_Trial(name, exchange) for name, exchange in (sparse | dense).items()]
        self._sparse = list(sparse)
        self._current = self._trials[0]
        self._left = _WARM_UP_STEPS + _FIRST_STEPS
        self._skip = _WARM_UP_STEPS
        self._step_began_s: float | None = None
        self._wire_bytes_before = 0
        self.chosen: str | None = self._current.name if len(self._trials) == 1 else None

    def choose(self, name: str) -> None:
        """Use the exchange of this name from now on, as a run that is resumed has chosen."""
        (self._current,) = [trial for trial in self._trials if trial.name == name]
        self.chosen = name

    def launch(self, job: Job) -> Pending:
        return self._current.exchange.launch(job)

    def begin_step(self) -> None:
        """Account for the step that has ended, and go on to the next trial or decide."""
        if self.chosen is not None:
            return
        now_s, wire_bytes = time.perf_counter(), self._link.meter.stats.wire_bytes
        if self._step_began_s is not None:
            self._left -= 1
            if self._skip:
                self._skip -= 1
            else:
                self._current.step_s.append(now_s - self._step_began_s)
                self._current.wire_bytes.append(wire_bytes - self._wire_bytes_before)
        self._step_began_s, self._wire_bytes_before = now_s, wire_bytes
        if self._left == 0:
            self._next()

    def _next(self) -> None:
        following = self._trials.index(self._current) + 1
        if following < len(self._trials):
            self._current = self._trials[following]
            self._left = _STEPS + _SETTLING_STEPS
            self._skip = _SETTLING_STEPS
        else:
            self._decide()

    def _decide(self) -> None:
        mine = [
            [statistics.median(trial.step_s), statistics.median(trial.wire_bytes)]
            for trial in self._trials
        ]
        costs = torch.tensor(mine, dtype=torch.float64, device=self._link.device)
        # the slowest rank sets the pace, and every rank then decides on the same numbers
        dist.all_reduce(costs, dist.ReduceOp.MAX, group=self._link.group)
        step_s = {t.name: cost[0] for t, cost in zip(self._trials, costs.tolist(), strict=True)}
        wire = {t.name: cost[1] for t, cost in zip(self._trials, costs.tolist(), strict=True)}
        leanest = min(self._sparse, key=wire.__getitem__)
        rivals = [leanest, *(name for name in step_s if name not in self._sparse)]
        self.choose(min(rivals, key=step_s.__getitem__))
        if self._link.rank == 0:
            _log.info(
                "exchange %s chosen: %s",
                self.chosen,
                ", ".join(
                    f"{name} {1e3 * step_s[name]:.1f} ms a step and {wire[name] / 1e6:.3g} MB "
                    "on the link"
                    for name in step_s
                ),
            )

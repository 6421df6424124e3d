"""The part of a hook's state that is the same whatever the model is wrapped in."""

from __future__ import annotations

from torch.optim import Optimizer

from topq_dist.compress.unsent import UnsentWatch
from topq_dist.hook.call_watch import CallWatch
from topq_dist.hook.parts import HookParts, Knobs, Ranks
from topq_dist.telemetry.readings import Reading, rank_readings
from topq_dist.telemetry.stats import Meter, Stats


class HookState:
    """Figures of a hook on this rank, and the end of its hold on the optimizer."""

    _parts: HookParts
    # None until the ranks are known
    _ranks: Ranks | None

    def __init__(self, knobs: Knobs, optimizer: Optimizer | None, meter: Meter) -> None:
        self._knobs = knobs
        self._optimizer = optimizer
        self._calls = CallWatch(None)
        self._meter = meter
        # once somebody looks on
        self._watch: UnsentWatch | None = None
        self._ranks = None

    @property
    def chosen_exchange(self) -> str | None:
        """What exchange="auto" has chosen; None until it has, and where it was not asked to."""
        return None if self._ranks is None else self._ranks.exchange.chosen

    def detach(self) -> None:
        """Hand the optimizer its momentum back for good; a second call does nothing.

        The hook itself goes on, as with momentum="optimizer". What waits in the residual is sent
        with later gradients; but with momentum="adam" it is dropped, since a sum of directions
        cannot be sent with gradients.
        """
        self._parts.stages.momentum.detach()

    def stats(self) -> Stats:
        """Return this rank's totals so far; under fully_shard bytes are those between replicas."""
        return self._meter.stats

    def observe(self) -> None:
        """Measure from the next step on what waits in the residuals; a second call does nothing.

        What `telemetry.serve_metrics` and the like call; docs/metrics.md says what it costs. Of
        frames that stay on a GPU nothing is measured.
        """
        self._watch = self._watch or UnsentWatch()

    def readings(self) -> list[Reading]:
        """Return what this rank's metrics stand at now; from any thread."""
        unsent = None if self._watch is None else self._watch.reading
        return rank_readings(self._meter, unsent, self.chosen_exchange or self._knobs.exchange)

"""What waits in the residuals: how much beside the gradient, whether it grows, and for how long.

For who watches a run. Nothing of it changes a number, and none is measured unless asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from topq_dist.compress.coherence import measure_energies
from topq_dist.compress.layout import Layout
from topq_dist.compress.residual import ResidualUpdate
from topq_dist.dtypes import Indices
from topq_dist.telemetry.readings import UnsentReading

# of the norms, which cost a look at 1/32 of both vectors
_EVERY_STEPS = 10
_MEASURED_IN_A_MEAN = 5
# of a layout: their residuals are picked out at every step
_MOST_COORDINATES = 1024


@dataclass
class _Ages:
    """Steps that chosen coordinates of a layout have waited; places ascend."""

    places: Indices
    steps: Indices = field(init=False)

    def __post_init__(self) -> None:
        self.steps = np.zeros(self.places.size, np.int64)

    def count(self, update: ResidualUpdate) -> None:
        """Take in one more step, whose update has been applied."""
        sent = update.indices.cpu().numpy()
        places = torch.from_numpy(self.places).to(update.residual.device)
        waits = (update.residual.index_select(0, places) != 0).cpu().numpy()
        at = np.searchsorted(sent, self.places)
        at[at == sent.size] = 0
        was_sent = sent[at] == self.places if sent.size else np.zeros(self.places.size, bool)
        self.steps = np.where(was_sent | ~waits, 0, self.steps + 1)


class UnsentWatch:
    """Follows the residuals of one rank, step by step; see the metrics residual_ratio and the like.

    every: the norms are measured at one step in so many. Not for several threads at once; `reading`
    may be read from any.
    """

    def __init__(self, *, every: int = _EVERY_STEPS) -> None:
        self._every = every
        self.reading = UnsentReading()
        self._steps = 0
        self._ages: dict[Layout, _Ages] = {}
        self._of_residual = self._of_gradient = 0.0
        self._ratios: list[float] = []
        self._mean: float | None = None
        self._growing_steps = 0

    def compressed(self, update: ResidualUpdate | None) -> None:
        """Look at a vector that was compressed; its update is not yet applied."""
        if update is None or update.gradient is None or self._steps % self._every:
            return
        of_residual, of_gradient = measure_energies(update.gradient, update.residual, update.layout)
        self._of_residual += of_residual
        self._of_gradient += of_gradient

    def void(self) -> None:
        """Forget what was compressed in a step that does not count."""
        self._of_residual = self._of_gradient = 0.0

    def applied(self, updates: Sequence[ResidualUpdate]) -> None:
        """Take in a step, all of whose updates have been applied."""
        if not updates:
            return
        self._take_ratio()
        self._steps += 1
        oldest = 0
        for update in updates:
            ages = self._ages.get(update.layout)
            if ages is None:
                ages = self._ages[update.layout] = _Ages(_chosen(update.layout.numel))
            ages.count(update)
            oldest = max(oldest, int(ages.steps.max(initial=0)))
        if len(self._ages) > len(updates):  # of buckets that are laid out anew
            layouts = {update.layout for update in updates}
            self._ages = {one: ages for one, ages in self._ages.items() if one in layouts}
        self.reading = UnsentReading(
            residual_ratio=self._ratios[-1] if self._ratios else self.reading.residual_ratio,
            growing_steps=self._growing_steps,
            oldest_steps=oldest,
        )

    def _take_ratio(self) -> None:
        if not self._of_gradient > 0.0:
            return
        ratio = math.sqrt(self._of_residual / self._of_gradient)
        self._of_residual = self._of_gradient = 0.0
        if not math.isfinite(ratio):
            return
        if len(self._ratios) == _MEASURED_IN_A_MEAN:
            self._ratios = []
        self._ratios.append(ratio)
        if len(self._ratios) < _MEASURED_IN_A_MEAN:
            return
        mean = sum(self._ratios) / _MEASURED_IN_A_MEAN
        grows = self._mean is not None and mean > self._mean
        steps = _MEASURED_IN_A_MEAN * self._every
        self._growing_steps = self._growing_steps + steps if grows else 0
        self._mean = mean


def _chosen(numel: int) -> Indices:
    """Return places spread over a vector, the same whenever it is of this length."""
    if numel <= _MOST_COORDINATES:
        return np.arange(numel)
    # drawn, not evenly spaced: rows may be of a length that divides the space
    drawn = np.random.default_rng(numel).integers(0, numel, _MOST_COORDINATES)
    return np.unique(drawn)

"""Advice as a table for people, and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from topq_dist.advice.time_model import (
    GivenLink,
    MeasuredLink,
    Prediction,
    Recommendation,
)

_UNKNOWN = """\
Not known here: what a method does to accuracy (docs/convergence.md, docs/density.md, and for local
steps docs/local_steps.md have what was trained), and how much of the link's time goes on beside the
backward pass: the step may be shorter than predicted by as much, at most by that pass."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Predictions of a step, the fastest first, and the one to use.

    parameters: trainable ones. link: of which `seconds(collective, bytes)` says how long it takes.
    `predictions` are in seconds and bytes of one rank and step; compute, engine and link add up to
    a step.
    """

    parameters: int
    world_size: int
    link: GivenLink | MeasuredLink
    predictions: tuple[Prediction, ...]
    recommendation: Recommendation

    def as_json(self) -> str:
        """Return all of it as one JSON object, in seconds and bytes."""
        return json.dumps(
            {
                "parameters": self.parameters,
                "world_size": self.world_size,
                "link": asdict(self.link),
                "predictions": [_record(one) for one in self.predictions],
                "recommended": self.recommendation.prediction.method.title,
                "reason": self.recommendation.reason,
            }
        )

    def text(self) -> str:
        """Return the table, the link, the recommendation, and what is not known."""
        heads = ("method", "step ms", "compute", "engine", "link", "kB a step")
        rows = [heads, *(_cells(one) for one in self.predictions)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
        lines = [
            f"{row[0]:{widths[0]}}  "
            + "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
            for row in rows
        ]
        said = f"{self.parameters:,} parameters, {self.world_size} ranks; {self._link_text()}"
        return "\n".join(
            [said, "", *lines, "", f"Recommended: {self.recommendation.reason}.", "", _UNKNOWN]
        )

    def _link_text(self) -> str:
        if isinstance(self.link, GivenLink):
            rate, latency_s = self.link.bandwidth_bits_per_s, self.link.latency_s
            return f"a link of {rate / 1e6:g} Mbit/s and {1e3 * latency_s:g} ms, as given"
        name, points = max(self.link.points.items(), key=lambda item: item[1][-1][0])
        (few, few_s), (many, many_s) = points[0], points[-1]
        return (
            f"measured: {name.split()[0]} of {few} bytes {1e3 * few_s:.2f} ms, "
            f"of {many / 1e6:.3g} MB {1e3 * many_s:.1f} ms"
        )


def _cells(one: Prediction) -> tuple[str, ...]:
    times = (one.step_s, one.compute_s, one.engine_s, one.link_s)
    return (one.method.title, *(f"{1e3 * s:.1f}" for s in times), f"{one.wire_bytes / 1e3:,.1f}")


def _record(one: Prediction) -> dict[str, Any]:
    return {"title": one.method.title, **asdict(one), "step_s": one.step_s}

"""The rows of the benchmark of local steps, as a table, and its timelines as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl

from harness.console import text_table
from harness.ddp_worker import Measurement
from harness.netns import LINK_TITLES

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

_STEP, _ROUNDS, _LINK = "#9cc3e6", "#c0392b", "#4d4d4d"
_BITS_PER_S = {"1gbit": 1e9, "100mbit": 1e8}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method on one link: milliseconds and bytes of an inner step, or the error that ended it.

    step_ms, compute_ms: with rounds and without any, medians over blocks of the slowest rank.
    ratio: the median of what a block with rounds took over what the block after it took.
    timeline: of the first rank.
    """

    link: str
    method: str
    pairs: int = 0
    step_ms: float | None = None
    compute_ms: float | None = None
    ratio: float | None = None
    lowest_ratio: float | None = None
    highest_ratio: float | None = None
    sent_bytes: float | None = None
    select_ms: float | None = None
    wait_ms: float | None = None
    timeline: dict[str, Any] | None = None
    error: str | None = None


def summarize(link: str, method: str, ranks: Sequence[Measurement]) -> Row:
    """Return one method's row from every rank's measurement."""
    step_s = list(map(max, zip(*(rank.step_s for rank in ranks), strict=True)))
    compute_s = list(map(max, zip(*(rank.compute_s for rank in ranks), strict=True)))
    ratios = [step / alone for step, alone in zip(step_s, compute_s, strict=True)]
    return Row(
        link=link,
        method=method,
        pairs=len(ratios),
        step_ms=1e3 * statistics.median(step_s),
        compute_ms=1e3 * statistics.median(compute_s),
        ratio=statistics.median(ratios),
        lowest_ratio=min(ratios),
        highest_ratio=max(ratios),
        sent_bytes=max(rank.sent_bytes for rank in ranks),
        select_ms=1e3 * max(rank.select_s or 0.0 for rank in ranks),
        wait_ms=1e3 * max(rank.wait_s or 0.0 for rank in ranks),
        timeline=ranks[0].timeline,
    )


def table(rows: Sequence[Row]) -> str:
    """Return what is printed: a row a method, what its rounds add to a step on each link."""
    links = list(dict.fromkeys(row.link for row in rows))
    shown = {(row.method, row.link): _cell(row) for row in rows}
    lines = {
        method: [shown.get((method, link), "") for link in links]
        for method in dict.fromkeys(row.method for row in rows)
    }
    return text_table("an inner step with rounds", [LINK_TITLES[link] for link in links], lines)


def _cell(row: Row) -> str:
    if row.step_ms is None or row.ratio is None or row.sent_bytes is None:
        return "failed"
    return f"{row.step_ms:.0f} ms ({100 * row.ratio - 100:+.1f} %)"


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write a panel a method and link: inner steps, what rounds hold up, the link's load."""
    drawn = [row for row in rows if row.timeline is not None]
    figure, axes = plt.subplots(
        len(drawn), 1, figsize=(11.0, 0.6 + 1.35 * len(drawn)), squeeze=False
    )
    for axis, row in zip(axes[:, 0], drawn, strict=True):
        _draw_one(axis, row)
    axes[-1, 0].set_xlabel("seconds")
    handles = [Rectangle((0, 0), 1, 1, color=color) for color in (_STEP, _ROUNDS, _LINK)]
    names = ["inner steps", "the step waits for a round, or works on one", "load of the link"]
    figure.legend(handles, names, loc="lower center", ncols=3, frameon=False)
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0.4 / (0.6 + 1.35 * len(drawn)), 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_one(axis: Any, row: Row) -> None:
    timeline = row.timeline or {"steps": [], "sent": []}
    for start_s, stepped_s, ended_s in timeline["steps"]:
        axis.broken_barh(
            [(start_s, stepped_s - start_s)], (1.15, 0.7), color=_STEP, edgecolor="white"
        )
        axis.broken_barh([(stepped_s, ended_s - stepped_s)], (1.15, 0.7), color=_ROUNDS)
    at_s, load = link_load(timeline["sent"], _BITS_PER_S.get(row.link, 1e10))
    axis.fill_between(at_s, load, step="pre", color=_LINK, linewidth=0.0)
    axis.set_xlim(0.0, timeline["steps"][-1][2])
    axis.set_ylim(0.0, 2.0)
    axis.set_yticks([0.5, 1.5], ["link", "rank 0"])
    axis.spines[["top", "right"]].set_visible(False)
    ratio = "" if row.ratio is None else f": {100 * row.ratio - 100:+.1f} % to steps without rounds"
    axis.set_title(f"{LINK_TITLES[row.link]}, {row.method}{ratio}", fontsize=9, loc="left")


def link_load(
    sent: Sequence[Sequence[float]], bits_per_s: float
) -> tuple[list[float], list[float]]:
    """Return when samples were taken, and the share of the link that was used until then.

    sent: (seconds, bytes that had left by then). A burst of the shaper is drawn as a full link.
    """
    at_s, load = [], []
    for (before_s, before), (now_s, now) in pairwise(sent):
        at_s.append(now_s)
        load.append(min(1.0, 8.0 * (now - before) / (bits_per_s * (now_s - before_s))))
    return at_s, load

"""The rows of the time-to-accuracy benchmark, as a table and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path

import matplotlib as mpl

from harness.ddp_report import COLORS
from harness.netns import LINK_TITLES
from harness.time_to_accuracy_worker import TITLES, Outcome

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

POINTS_BELOW_DENSE = 0.5
ESTIMATED_NOTE = (
    "* trained at loopback speed, since what it sends does not depend on the link: seconds and "
    "bytes are steps times those of a step, measured on the link"
)
_HEADS = ("ms a step", "steps", "seconds", "shorter", "kB a step", "MB sent", "at the end")
_COLUMN = 13
# the first looks would squeeze the rest of a panel
_SHOWN_BELOW_TARGET, _SHOWN_ABOVE_TARGET = 16.0, 3.0


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One run of a method: what it had come to at each evaluation, from the first step on.

    accuracy: per cent of the test images. training_s: seconds of all steps so far, without the
    evaluations. sent_bytes: by the rank that sent most; empty where they were not counted.
    """

    steps: list[int]
    accuracy: list[float]
    training_s: list[float]
    sent_bytes: list[float]
    step_ms: float
    chosen_exchange: str | None = None

    def at_pace(self, step_ms: float, step_bytes: float) -> Curve:
        """Return the same training with steps that all take this long and send this much."""
        return replace(
            self,
            step_ms=step_ms,
            training_s=[1e-3 * step_ms * done for done in self.steps],
            sent_bytes=[step_bytes * done for done in self.steps],
        )

    def step_bytes(self) -> float | None:
        """Return what a step of the last interval sent, which is far behind every warm-up."""
        if not self.sent_bytes:
            return None
        return _differences(self.sent_bytes)[-1] / _differences(self.steps)[-1]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method on a link: means over the seeds, whose own curves are in `curves`, or the error.

    The target is reached at the first evaluation at which the mean accuracy is no less than it;
    None where it never is. sent_bytes and seconds up to there are a rank's from the first step on,
    warm-up and trials included; step_bytes is what a step sends after them. times_shorter is
    dense's time on the same link over this one's. estimated: see ESTIMATED_NOTE.
    """

    link: str
    method: str
    estimated: bool = False
    step_ms: float | None = None
    step_bytes: float | None = None
    steps_to_target: int | None = None
    seconds_to_target: float | None = None
    sent_bytes_to_target: float | None = None
    times_shorter: float | None = None
    final_accuracy: float | None = None
    steps: list[int]
    accuracy: list[float]
    training_s: list[float]
    curves: list[Curve]
    error: str | None = None


def slowest_ms(ranks: Sequence[Outcome], skip: int = 0) -> float:
    """Return the median milliseconds of a step of the slowest rank, the first `skip` left out."""
    return 1e3 * max(statistics.median(rank.step_s[skip:]) for rank in ranks)


def curve_of(ranks: Sequence[Outcome]) -> Curve:
    """Return the curve of a run from what each rank saw; an interval is as long as its slowest."""
    intervals = [
        max(interval)
        for interval in zip(*(_differences(rank.training_s) for rank in ranks), strict=True)
    ]
    return Curve(
        steps=ranks[0].steps,
        accuracy=_means([rank.accuracy for rank in ranks]),
        training_s=list(accumulate(intervals)),
        sent_bytes=[max(sent) for sent in zip(*(rank.sent_bytes for rank in ranks), strict=True)],
        step_ms=slowest_ms(ranks),
        chosen_exchange=ranks[0].chosen_exchange,
    )


def failed(link: str, method: str, error: str) -> Row:
    """Return the row of a method that did not get through."""
    return Row(
        link=link, method=method, steps=[], accuracy=[], training_s=[], curves=[], error=error
    )


def row_of(link: str, method: str, curves: Sequence[Curve], *, estimated: bool) -> Row:
    """Return the means of a method's runs, without what depends on a target."""
    accuracy = _means([curve.accuracy for curve in curves])
    return Row(
        link=link,
        method=method,
        estimated=estimated,
        step_ms=statistics.fmean(curve.step_ms for curve in curves),
        step_bytes=_mean([curve.step_bytes() for curve in curves]),
        final_accuracy=accuracy[-1],
        steps=curves[0].steps,
        accuracy=accuracy,
        training_s=_means([curve.training_s for curve in curves]),
        curves=list(curves),
    )


def target_of(dense: Sequence[Curve]) -> float:
    """Return dense's mean accuracy at its end, less half a point."""
    return statistics.fmean(curve.accuracy[-1] for curve in dense) - POINTS_BELOW_DENSE


def with_target(rows: Sequence[Row], target: float | None) -> list[Row]:
    """Return the rows with what it took them to reach the target; None reaches nothing."""
    reached = [row if target is None else _reached(row, target) for row in rows]
    dense_s = {row.link: row.seconds_to_target for row in reached if row.method == "dense"}
    return [
        replace(row, times_shorter=_ratio(dense_s.get(row.link), row.seconds_to_target))
        for row in reached
    ]


def _reached(row: Row, target: float) -> Row:
    place = next((at for at, accuracy in enumerate(row.accuracy) if accuracy >= target), None)
    if place is None:
        return row
    return replace(
        row,
        steps_to_target=row.steps[place],
        seconds_to_target=row.training_s[place],
        sent_bytes_to_target=_mean(
            [curve.sent_bytes[place] if curve.sent_bytes else None for curve in row.curves]
        ),
    )


def _ratio(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first / second


def _differences(totals: Sequence[float]) -> list[float]:
    return [after - before for before, after in pairwise((0, *totals))]


def _mean(numbers: Sequence[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return statistics.fmean(known) if known else None


def _means(lists: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(numbers) for numbers in zip(*lists, strict=True)]


def table(rows: Sequence[Row], target: float | None) -> str:
    """Return what is printed: a block a link, with what it took each method to the target."""
    width = max(len(title) for title in TITLES.values()) + 2
    blocks = []
    for link in dict.fromkeys(row.link for row in rows):
        here = [row for row in rows if row.link == link]
        lines = [f"{LINK_TITLES[link]:{width}}" + "".join(f"{head:>{_COLUMN}}" for head in _HEADS)]
        for row in here:
            label = TITLES[row.method] + (" *" if row.estimated else "")
            lines.append(f"{label:{width}}" + "".join(f"{cell:>{_COLUMN}}" for cell in _cells(row)))
        blocks.append("\n".join(lines))
    goal = "dense has none" if target is None else f"{target:.2f} % of the test images"
    about = (
        f"steps, seconds, shorter (than dense) and MB sent: to {goal}, dense's end less "
        f"{POINTS_BELOW_DENSE} points; bytes are a rank's"
    )
    below = [about]
    if any(row.estimated for row in rows):
        below.append(ESTIMATED_NOTE)
    chosen = {
        f"{LINK_TITLES[row.link]}: {curve.chosen_exchange}"
        for row in rows
        for curve in row.curves
        if curve.chosen_exchange is not None
    }
    if chosen:
        below.append(f"what topq_dist's exchange='auto' chose: {', '.join(sorted(chosen))}")
    return "\n\n".join((*blocks, "\n".join(below)))


def _cells(row: Row) -> tuple[str, ...]:
    if row.error is not None:
        return ("failed",)
    start = (_number(row.step_ms, ".1f"),)
    sent = _number(row.step_bytes, ",.0f", 1e-3)
    end = f"{_number(row.final_accuracy, '.2f')} %"
    if row.seconds_to_target is None:
        return (*start, "not reached", "-", "-", sent, "-", end)
    return (
        *start,
        _number(row.steps_to_target, "d"),
        _number(row.seconds_to_target, ".1f"),
        f"{_number(row.times_shorter, '.1f')} x",
        sent,
        _number(row.sent_bytes_to_target, ",.0f", 1e-6),
        end,
    )


def _number(value: float | None, form: str, scale: float | None = None) -> str:
    if value is None:
        return "-"
    return format(value if scale is None else scale * value, form)


def draw(rows: Sequence[Row], target: float | None, title: str, path: Path) -> None:
    """Write accuracy against seconds on a log axis, a panel a link, a dot where it is reached."""
    links = list(dict.fromkeys(row.link for row in rows))
    figure, axes = plt.subplots(
        1, len(links), figsize=(1.5 + 5.0 * len(links), 5.6), sharey=True, squeeze=False
    )
    for axis, link in zip(axes[0], links, strict=True):
        shown = [row for row in rows if row.link == link and row.error is None]
        for row in shown:
            _draw_row(axis, row)
        if target is not None:
            axis.axhline(target, color="black", linewidth=0.8, linestyle=":")
            axis.set_ylim(target - _SHOWN_BELOW_TARGET, target + _SHOWN_ABOVE_TARGET)
            axis.annotate(
                f"target {target:.2f} %",
                (0.01, target),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                fontsize=8,
            )
        axis.set_title(LINK_TITLES[link])
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("seconds of training (log scale)")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    axes[0][0].set_ylabel("per cent of the test images")
    figure.suptitle(f"{title}; target: dense's end less {POINTS_BELOW_DENSE} points")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_row(axis: Axes, row: Row) -> None:
    color, title = COLORS[row.method], TITLES[row.method]
    if row.steps_to_target is None:
        label = f"{title}: not reached"
    else:
        # beside the dots there is no room where methods are near each other
        label = f"{title}: {row.seconds_to_target:.3g} s"
        place = row.steps.index(row.steps_to_target)
        axis.plot(row.training_s[place], row.accuracy[place], marker="o", color=color)
    axis.plot(row.training_s, row.accuracy, color=color, label=label)

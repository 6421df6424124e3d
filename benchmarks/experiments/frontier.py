"""The frontier picture: test quality over bytes, a line for each family of methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convergence_runs import Group, difference_text

_PANELS = (("gpt-moby", 1000), ("cifar10-sgd", 1500))
_FROM, _TO = 30, 2000


@dataclass(frozen=True, kw_only=True)
class Family:
    """Methods that differ in how much they send. prefixes: how their names begin."""

    title: str
    methods: tuple[str, ...]
    color: str
    marker: str
    ours: bool = False


FAMILIES = (
    Family(
        title="topq_dist, the hook",
        methods=(
            "top-Q, q=0.9",
            "top-Q",
            "top-Q, q=0.99",
            "top-Q, q=0.9982",
            "top-Q, q=0.9985",
        ),
        color="#b3263e",
        marker="o",
        ours=True,
    ),
    Family(
        title="topq_dist, local steps",
        methods=(
            "local, H=2",
            "local, H=5",
            "local, H=4, ec1",
            "local, H=8, ec1",
            "local with momentum, H=5",
        ),
        color="#e07b39",
        marker="s",
        ours=True,
    ),
    Family(
        title="PowerSGD, ranks 1 to 8",
        methods=("PowerSGD 8", "PowerSGD 4", "PowerSGD 2", "PowerSGD 1"),
        color="#2e7d4f",
        marker="^",
    ),
    Family(
        title="DGC, 1 % and 0.1 %",
        methods=("DGC, q=0.99", "DGC, q=0.999"),
        color="#7b3294",
        marker="P",
    ),
    Family(
        title="SparseLoCo's codec, H = 1 to 30",
        methods=tuple(f"SparseLoCo, H={every}" for every in (1, 5, 15, 30)),
        color="#3aa0c9",
        marker="X",
    ),
    Family(
        title="DiLoCo, H = 5, 30",
        methods=("DiLoCo, H=5", "DiLoCo, H=30"),
        color="#8c6b1f",
        marker="D",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A method on one task. loss: per cent of loss above dense, or points of accuracy below."""

    method: str
    family: Family
    ratio: float
    loss: float
    seeds: int


def panels_of(groups: Sequence[Group]) -> list[tuple[Group, list[Point]]]:
    """Return the tasks of the picture that have runs, each with its points."""
    known = {(group.task.name, group.steps): group for group in groups if group.workers == 4}
    return [(known[key], _points(known[key])) for key in _PANELS if key in known]


def _points(group: Group) -> list[Point]:
    sign = -1.0 if group.task.quality == "accuracy" else 1.0
    points = []
    for family in FAMILIES:
        for method in family.methods:
            difference = group.difference(method, "test")
            if difference is None or any(run.failed for run in group.runs[method].values()):
                continue
            points.append(
                Point(
                    method=method,
                    family=family,
                    ratio=group.mean(method, "ratio"),
                    loss=sign * difference,
                    seeds=len(group.common_seeds(method, "dense")),
                )
            )
    return points


def envelope_rows(groups: Sequence[Group]) -> list[list[str]]:
    """Return a row for each point of others from 30 x to 2,000 x, with ours that beats it.

    Ours beats it where it is no worse in fewer bytes: the best such is named, or "none".
    """
    rows = []
    for group, points in panels_of(groups):
        ours = [point for point in points if point.family.ours]
        for point in points:
            if point.family.ours or not _FROM <= point.ratio <= _TO:
                continue
            better = [o for o in ours if o.ratio >= point.ratio and o.loss <= point.loss]
            best = min(better, key=lambda one: one.loss, default=None)
            found = f"{best.method}: {_text(group, best)}" if best else "**none**"
            rows.append([group.task.name, point.method, _text(group, point), found])
    return rows


def _text(group: Group, point: Point) -> str:
    count = "" if point.seeds == 3 else f" ({point.seeds} seed{'s' * (point.seeds > 1)})"
    difference = difference_text(group.task, group.difference(point.method, "test"))
    return f"{difference} at {point.ratio:.0f} x{count}"


def draw_frontier(groups: Sequence[Group], path: Path) -> bool:
    """Draw the picture; return whether there was anything to draw."""
    panels = panels_of(groups)
    if not any(points for _, points in panels):
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (group, points) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        _draw_panel(axes, group, points)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)
    return True


def _draw_panel(axes: Any, group: Group, points: Sequence[Point]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.axhline(0.0, color="#6f8fb5", linewidth=1.6, zorder=0, label="dense")
    for family in FAMILIES:
        mine = sorted((p for p in points if p.family is family), key=lambda p: p.ratio)
        axes.plot(
            [p.ratio for p in mine],
            [p.loss for p in mine],
            color=family.color,
            marker=family.marker,
            markersize=8 if family.ours else 6,
            linewidth=2.2 if family.ours else 1.2,
            label=family.title,
        )
    axes.axvspan(_FROM, _TO, color="#000000", alpha=0.04, linewidth=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda times, _: f"{times:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    worse = "points of accuracy below dense" if group.task.quality == "accuracy" else (
        "per cent of loss above dense"
    )  # fmt: skip
    axes.set_xlabel("times fewer bytes than dense")
    axes.set_ylabel(f"test: {worse} (lower is better)")
    axes.set_title(f"{group.task.name}: {group.workers} ranks, {group.steps:,} steps")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)

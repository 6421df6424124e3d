"""The pictures of docs/convergence.md: quality over bytes, and over steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from convergence_runs import Group, Run

STYLES: dict[str, tuple[str, str]] = {
    "dense": ("#6f8fb5", "D"),
    "dense, no momentum": ("#2f4b6e", "d"),
    "fp16 hook": ("#7a7a7a", "s"),
    "PowerSGD 1": ("#2e7d4f", "^"),
    "PowerSGD 4": ("#7fbf94", "v"),
    "top-Q": ("#b3263e", "o"),
    "top-Q, q=0.99": ("#e07b39", "o"),
    "top-Q, q=0.9982": ("#7b3294", "o"),
    "top-Q, optimizer's momentum": ("#222222", "X"),
    "top-Q, corrected": ("#c99700", "P"),
    "top-Q, adam": ("#3aa0c9", "*"),
}
_OTHERS = (("#a6761d", "h"), ("#e7298a", "p"), ("#66a61e", "<"), ("#1b9e77", ">"), ("#8c6bb1", "H"))
# the others would hide them
_CURVES = ("dense", "dense, no momentum", "PowerSGD 1", "PowerSGD 4", "top-Q", "top-Q, q=0.99",
           "top-Q, q=0.9982", "top-Q, optimizer's momentum")  # fmt: skip
_QUALITIES = {"accuracy": "accuracy (%)", "loss": "loss (nats)"}
# what a curve does before is the same for all, and would hide the rest
_SHOWN_FROM = 0.3


def draw(group: Group, path: Path) -> None:
    """Draw one group: left the test quality over times fewer bytes, right the validation curves.

    Methods of which a run failed are named in the title instead.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    by_bytes, by_step = figure.subplots(1, 2)
    styles = _styles(group.methods)
    left_out = _draw_frontier(by_bytes, group, styles)
    _draw_curves(by_step, group, styles)
    for axes in (by_bytes, by_step):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = by_bytes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False
    )
    title = f"{group.task.name}: {group.workers} ranks, {group.steps:,} steps"
    if left_out:
        title += f"\nfailed, not drawn: {'; '.join(left_out)}"
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def _styles(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    others = cycle(_OTHERS)
    chosen = {name: STYLES[name] if name in STYLES else next(others) for name in methods}
    return {name: {"color": color, "marker": marker} for name, (color, marker) in chosen.items()}


def _draw_frontier(axes: Any, group: Group, styles: dict[str, dict[str, Any]]) -> list[str]:
    """Draw a dot a method and return the methods that have none."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    left_out = []
    drawn: list[float] = []
    for method in group.methods:
        runs = list(group.runs.get(method, {}).values())
        tests = [run.test for run in runs]
        if not tests:
            continue
        if any(run.failed for run in runs):
            left_out.append(method)
            continue
        ratio, mean = group.mean(method, "ratio"), statistics.fmean(tests)
        style = styles[method]
        axes.vlines(ratio, min(tests), max(tests), color=style["color"], linewidth=1.0)
        axes.plot(ratio, mean, linestyle="none", markersize=8, label=method, **style)
        if method == "dense":
            axes.axhline(mean, color=style["color"], linewidth=1.3, zorder=0)
        drawn += tests
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda times, _: f"{times:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    if group.task.quality == "loss" and drawn and max(drawn) > 4 * min(drawn) > 0:
        _set_log_loss(axes)
    axes.margins(x=0.08, y=0.1)
    axes.set_xlabel("times fewer bytes than dense")
    axes.set_ylabel(f"test {_QUALITIES[group.task.quality]}, mean and range of seeds")
    return left_out


def _draw_curves(axes: Any, group: Group, styles: dict[str, dict[str, Any]]) -> None:
    late = []
    for method in _CURVES:
        curve = _mean_curve(list(group.runs.get(method, {}).values()))
        if not curve:
            continue
        steps, values = zip(*curve, strict=True)
        # dense lies below, and stays to be seen where others agree
        width = 3.0 if method == "dense" else 1.3
        axes.plot(steps, values, color=styles[method]["color"], linewidth=width)
        late += [value for step, value in curve if step >= _SHOWN_FROM * group.steps]
    if late and min(late) < max(late):
        if group.task.quality == "loss" and max(late) > 4 * min(late) > 0:
            _set_log_loss(axes)
        else:
            margin = 0.06 * (max(late) - min(late))
            axes.set_ylim(min(late) - margin, max(late) + margin)
    axes.set_xlabel("step")
    axes.set_ylabel(f"validation {_QUALITIES[group.task.quality]}")


def _mean_curve(runs: Sequence[Run]) -> list[tuple[int, float]]:
    """Return the mean over the runs at the steps that all have, where it is a number."""
    curves = [dict(run.curve) for run in runs]
    if not curves:
        return []
    steps = sorted(set.intersection(*map(set, curves)))
    means = [(step, statistics.fmean(curve[step] for curve in curves)) for step in steps]
    return [(step, mean) for step, mean in means if math.isfinite(mean)]


def _set_log_loss(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())

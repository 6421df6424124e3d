"""The rows of the DDP-step benchmark, as a table and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

from harness.baselines import HOOKS
from harness.console import text_table
from harness.ddp_worker import Measurement
from harness.netns import LINK_TITLES

mpl.use("Agg")
from matplotlib import pyplot as plt

COLORS = {
    "dense": "#4d4d4d",
    "fp16": "#a6a6a6",
    "powersgd1": "#3b6ea5",
    "powersgd4": "#9cc3e6",
    "topk": "#e0a458",
    "topq": "#c0392b",
    "topq_defaults": "#7f1d1d",
    "topq_allgather": "#e8837a",
    "topq_split": "#7b4173",
    "topq_dense": "#c994c7",
}
# a log axis has no room for an exchange that costs nothing
AXIS_FLOOR_MS = 1.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One hook on one link: milliseconds and bytes a step, or the error that ended it.

    A step is as long as its slowest rank's; times are medians over the steps. `ratio_to_dense` is
    this exchange over dense's on the same hosts. `sent_bytes` left the busiest rank's interface;
    `handed_bytes`, `select_ms`, `wait_ms` and `chosen_exchange` are topq_dist's own account.
    """

    link: str
    hosts: int
    hook: str
    pairs: int = 0
    exchange_ms: float | None = None
    step_ms: float | None = None
    compute_ms: float | None = None
    ratio_to_dense: float | None = None
    sent_bytes: float | None = None
    handed_bytes: float | None = None
    select_ms: float | None = None
    wait_ms: float | None = None
    chosen_exchange: str | None = None
    error: str | None = None


def summarize(link: str, hook: str, ranks: Sequence[Measurement], dense_ms: float | None) -> Row:
    """Return one hook's row from every rank's measurement and dense's exchange, where known."""
    step_ms = 1e3 * statistics.median(map(max, zip(*(r.step_s for r in ranks), strict=True)))
    compute_ms = 1e3 * statistics.median(map(max, zip(*(r.compute_s for r in ranks), strict=True)))
    exchange_ms = step_ms - compute_ms
    if hook == "dense":
        dense_ms = exchange_ms
    return Row(
        link=link,
        hosts=len(ranks),
        hook=hook,
        pairs=len(ranks[0].step_s),
        exchange_ms=exchange_ms,
        step_ms=step_ms,
        compute_ms=compute_ms,
        ratio_to_dense=exchange_ms / dense_ms if dense_ms else None,
        sent_bytes=max(r.sent_bytes for r in ranks),
        handed_bytes=_largest([r.handed_bytes for r in ranks]),
        select_ms=_largest([r.select_s for r in ranks], 1e3),
        wait_ms=_largest([r.wait_s for r in ranks], 1e3),
        chosen_exchange=ranks[0].chosen_exchange,
    )


def _largest(values: Sequence[float | None], scale: float = 1.0) -> float | None:
    known = [value for value in values if value is not None]
    return scale * max(known) if known else None


def table(rows: Sequence[Row]) -> str:
    """Return what is printed: for each number of hosts the exchange, then the bytes, by hook."""
    blocks = []
    for count in dict.fromkeys(row.hosts for row in rows):
        here = [row for row in rows if row.hosts == count]
        for title, show in (
            ("exchange, ms a step (share of dense)", _exchange),
            ("sent, kB a rank and step", _sent),
            ("the step under no_sync, ms", _compute),
        ):
            links = list(dict.fromkeys(row.link for row in here))
            shown = {(row.hook, row.link): show(row) for row in here}
            lines = {
                HOOKS[hook].title: [shown[hook, link] for link in links]
                for hook in dict.fromkeys(row.hook for row in here)
            }
            heads = [LINK_TITLES[link] for link in links]
            blocks.append(text_table(f"{count} hosts: {title}", heads, lines))
    hooks = [HOOKS[name] for name in dict.fromkeys(row.hook for row in rows)]
    blocks.append("\n".join(f"{hook.title}: {hook.note}" for hook in hooks if hook.note))
    return "\n\n".join(blocks)


def _exchange(row: Row) -> str:
    if row.exchange_ms is None:
        return "failed"
    share = f" ({row.ratio_to_dense:.3f})" if row.ratio_to_dense is not None else ""
    chosen = f"{row.chosen_exchange} " if row.chosen_exchange is not None else ""
    return f"{chosen}{row.exchange_ms:.1f}{share}"


def _sent(row: Row) -> str:
    return f"{row.sent_bytes / 1e3:.0f}" if row.sent_bytes is not None else "failed"


def _compute(row: Row) -> str:
    return f"{row.compute_ms:.0f}" if row.compute_ms is not None else "failed"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the exchange times as grouped bars on a log axis, a panel for each number of hosts."""
    counts = list(dict.fromkeys(row.hosts for row in rows))
    links = list(dict.fromkeys(row.link for row in rows))
    hooks = list(dict.fromkeys(row.hook for row in rows))
    figure, axes = plt.subplots(
        1, len(counts), figsize=(1.5 + 5.5 * len(counts), 5.0), sharey=True, squeeze=False
    )
    slowest_ms = max([AXIS_FLOOR_MS, *(r.exchange_ms for r in rows if r.exchange_ms is not None)])
    bar_width = 0.86 / len(hooks)
    for axis, count in zip(axes[0], counts, strict=True):
        for place, hook in enumerate(hooks):
            by_link = {r.link: r.exchange_ms for r in rows if (r.hosts, r.hook) == (count, hook)}
            times_ms = [by_link.get(link) for link in links]
            bars = axis.bar(
                [x + (place - (len(hooks) - 1) / 2) * bar_width for x in range(len(links))],
                [max(t, AXIS_FLOOR_MS) if t is not None else float("nan") for t in times_ms],
                width=bar_width,
                label=HOOKS[hook].title,
                color=COLORS.get(hook),
            )
            labels = [f"{t:.0f}" if t is not None else "" for t in times_ms]
            axis.bar_label(bars, labels=labels, fontsize=7, padding=1)
        axis.set_title(f"{count} hosts")
        axis.set_yscale("log")
        axis.set_ylim(AXIS_FLOOR_MS, 2.0 * slowest_ms)
        axis.set_xticks(range(len(links)), [LINK_TITLES[link] for link in links])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("exchange, ms a step (log scale)")
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False
    )
    figure.suptitle("What the gradient exchange adds to a DDP step of a 10.5 M-parameter MLP")
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)

"""Bytes that leave a rank in one step, against the number of ranks.

    python benchmarks/bytes_vs_world.py

Starts 2 to 16 processes on this machine's loopback and lets them exchange the gradient of a
10.5 M-parameter MLP, dense and through each of topq_dist's exchanges. The bytes are counted twice:
by the kernel on each rank's own sockets, and by topq_dist itself as handed to its collectives.
Prints a table, writes runs/bytes_vs_world.json and runs/bytes_vs_world.png.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib as mpl
import torch
from harness.baselines import HOOKS
from harness.console import integer_from, option_parser, say, text_table, write_report
from harness.ddp_worker import MIN_PAIRS, PARAMETERS
from harness.worker_pool import WorkerError, start_workers

mpl.use("Agg")
from matplotlib import pyplot as plt

LOOPBACK = "lo"
COLORS = {
    "dense": "#4d4d4d",
    "topq_allgather": "#3b6ea5",
    "topq_split": "#e0a458",
    "topq": "#c0392b",
}
MARKERS = {"topq_allgather": "s", "topq_split": "^", "topq": "o"}
DENSE_BYTES = 4 * PARAMETERS


@dataclass(frozen=True, kw_only=True)
class Row:
    """Bytes of one step at one world size, of the rank that sends most, or the error that came.

    `tcp_bytes` is payload that left the rank's sockets, `wire_bytes` topq_dist's own count of the
    same and `handed_bytes` of what it handed to collectives, `ring_bytes` what a dense ring
    all-reduce sends in theory.
    """

    world_size: int
    hook: str
    ring_bytes: float
    tcp_bytes: float | None = None
    wire_bytes: float | None = None
    handed_bytes: float | None = None
    chosen_exchange: str | None = None
    error: str | None = None


def ring_bytes(world_size: int) -> float:
    """Return 2 n (W - 1) / W elements of fp32, which a ring all-reduce sends a rank."""
    return 2 * DENSE_BYTES * (world_size - 1) / world_size


def measure_world(world_size: int, hooks: Sequence[str]) -> list[Row]:
    """Measure every hook among `world_size` processes of this machine."""
    rows: list[Row] = []
    left = list(hooks)
    while left:
        # a hook that fails takes its workers with it, and the next ones get new workers
        with start_workers(world_size, interface=LOOPBACK, command=lambda _, argv: argv) as workers:
            while left:
                hook = left.pop(0)
                say(f"{world_size} ranks: {HOOKS[hook].title}")
                row = Row(world_size=world_size, hook=hook, ring_bytes=ring_bytes(world_size))
                try:
                    ranks = workers.measure(hook, max_pairs=MIN_PAIRS, budget_s=0.0)
                except WorkerError as error:
                    say(f"failed: {error}")
                    rows.append(replace(row, error=str(error)))
                    break
                busiest = max(ranks, key=lambda rank: rank.tcp_bytes)
                rows.append(
                    replace(
                        row,
                        tcp_bytes=busiest.tcp_bytes,
                        wire_bytes=busiest.wire_bytes,
                        handed_bytes=busiest.handed_bytes,
                        chosen_exchange=busiest.chosen_exchange,
                    )
                )
    return rows


def frame_bytes(rows: Sequence[Row]) -> float | None:
    """Return the bytes of one rank's frames of a step, which an all-gather is handed as they are.

    None where no all-gather was measured.
    """
    frames = [row.handed_bytes for row in rows if row.hook == "topq_allgather"]
    return max((frame for frame in frames if frame is not None), default=None)


def table(rows: Sequence[Row]) -> str:
    """Return bytes a rank and step by world size and hook, counted twice, and in frames."""
    worlds = list(dict.fromkeys(row.world_size for row in rows))
    heads = [f"W = {world}" for world in worlds]
    theory = {"dense ring, 2n(W-1)/W": [_kilobytes(ring_bytes(world)) for world in worlds]}
    counted = _lines(rows, lambda row: _kilobytes(row.tcp_bytes))
    own = _lines(rows, lambda row: _kilobytes(row.wire_bytes))
    blocks = [
        text_table("left its sockets, kB a rank and step", heads, theory | counted),
        text_table("the same by topq_dist's own count, kB", heads, own),
    ]
    frame = frame_bytes(rows)
    if frame is not None:
        title = f"left its sockets, in frames of {_kilobytes(frame)} kB"
        blocks.append(text_table(title, heads, _lines(rows, lambda row: _frames(row, frame))))
    return "\n\n".join(blocks)


def _lines(rows: Sequence[Row], show: Callable[[Row], str]) -> dict[str, list[str]]:
    lines: dict[str, list[str]] = {}
    for row in rows:
        cell = "failed" if row.error is not None else show(row)
        lines.setdefault(HOOKS[row.hook].title, []).append(cell)
    return lines


def _kilobytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e3:.0f}"


def _frames(row: Row, frame: float) -> str:
    if row.tcp_bytes is None:
        return "-"
    chosen = f"{row.chosen_exchange} " if row.chosen_exchange is not None else ""
    return f"{chosen}{row.tcp_bytes / frame:.2f}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write bytes a rank against world size, one line a hook, both axes logarithmic."""
    figure, axis = plt.subplots(figsize=(7.0, 4.8))
    worlds = sorted({row.world_size for row in rows})
    axis.plot(
        worlds,
        [ring_bytes(world) / 1e6 for world in worlds],
        color=COLORS["dense"],
        linestyle=":",
        label="dense ring all-reduce, 2n(W-1)/W",
    )
    for hook in dict.fromkeys(row.hook for row in rows):
        mine = [row for row in rows if row.hook == hook and row.tcp_bytes is not None]
        axis.plot(
            [row.world_size for row in mine],
            [row.tcp_bytes / 1e6 for row in mine if row.tcp_bytes is not None],
            color=COLORS.get(hook),
            marker=MARKERS.get(hook, "."),
            # "auto" lies on the exchange that it chose
            linestyle="none" if HOOKS[hook].chooses else "-",
            label=HOOKS[hook].title,
        )
    frame = frame_bytes(rows)
    if frame is not None:
        axis.axhline(4 * frame / 1e6, color=COLORS["topq_split"], linestyle=":", label="4 frames")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(worlds, [str(world) for world in worlds])
    axis.set_xlabel("ranks")
    axis.set_ylabel("MB a rank and step (log scale)")
    axis.set_title("What leaves a rank in one step of a 10.5 M-parameter MLP")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Measure what was asked; return 0, or 1 where a hook failed."""
    parser = option_parser(__doc__)
    parser.add_argument("--worlds", nargs="+", type=integer_from(2), default=[2, 4, 8, 16])
    parser.add_argument("--hooks", nargs="+", choices=HOOKS, default=list(COLORS))
    options = parser.parse_args(argv)
    rows = [row for world in options.worlds for row in measure_world(world, options.hooks)]
    report = {
        "benchmark": "bytes_vs_world",
        "machine": {"cores": os.cpu_count(), "torch": torch.__version__},
        "settings": {"parameters": PARAMETERS, "pairs": MIN_PAIRS},
        "hooks": {hook: {"title": HOOKS[hook].title} for hook in options.hooks},
        "rows": [asdict(row) for row in rows],
    }
    write_report(options.out, "bytes_vs_world", report)
    draw(rows, options.out / "bytes_vs_world.png")
    print(table(rows))
    return 1 if any(row.error for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Bytes that leave a rank in one step, against the number of ranks.

    python benchmarks/bytes_vs_world.py

Starts 2 to 16 processes on this machine's loopback and lets them exchange the gradient of a
10.5 M-parameter MLP, dense and through each of topq_dist's exchanges. The bytes are counted twice:
by the kernel on each rank's own sockets, and by topq_dist itself as handed to its collectives.
Prints a table, writes runs/bytes_vs_world.json and runs/bytes_vs_world.png.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib as mpl
import torch
from console import integer_from, say, text_table
from crew import CrewError, crew
from ddp_worker import MIN_PAIRS, PARAMETERS
from peers import HOOKS

mpl.use("Agg")
from matplotlib import pyplot as plt

OUT = Path(__file__).resolve().parents[1] / "runs"
LOOPBACK = "lo"
COLORS = {
    "dense": "#4d4d4d",
    "topq_allgather": "#3b6ea5",
    "topq_split": "#e0a458",
    "topq": "#c0392b",
}
DENSE_BYTES = 4 * PARAMETERS


@dataclass(frozen=True, kw_only=True)
class Row:
    """Bytes of one step at one world size, of the rank that sends most, or the error that came.

    `tcp_bytes` is payload that left the rank's sockets; `handed_bytes` topq_dist's own count of
    what it handed to collectives; `ring_bytes` what a dense ring all-reduce sends in theory.
    """

    world_size: int
    hook: str
    ring_bytes: float
    tcp_bytes: float | None = None
    handed_bytes: float | None = None
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
        with crew(world_size, interface=LOOPBACK, command=lambda _, argv: argv) as workers:
            while left:
                hook = left.pop(0)
                say(f"{world_size} ranks: {HOOKS[hook].title}")
                row = Row(world_size=world_size, hook=hook, ring_bytes=ring_bytes(world_size))
                try:
                    ranks = workers.measure(hook, max_pairs=MIN_PAIRS, budget_s=0.0)
                except CrewError as error:
                    say(f"failed: {error}")
                    rows.append(replace(row, error=str(error)))
                    break
                handed = [r.handed_bytes for r in ranks if r.handed_bytes is not None]
                rows.append(
                    replace(
                        row,
                        tcp_bytes=max(r.tcp_bytes for r in ranks),
                        handed_bytes=max(handed) if handed else None,
                    )
                )
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return kB a rank and step, by world size and hook, as each of the two counted it."""
    hooks = list(dict.fromkeys(row.hook for row in rows))
    worlds = list(dict.fromkeys(row.world_size for row in rows))
    cells = {(row.hook, row.world_size): row for row in rows}
    heads = [f"W = {world}" for world in worlds]
    theory = {"dense ring, 2n(W-1)/W": [_kilobytes(ring_bytes(world)) for world in worlds]}
    sent = {
        HOOKS[hook].title: [_kilobytes(cells[hook, world].tcp_bytes) for world in worlds]
        for hook in hooks
    }
    handed = {
        HOOKS[hook].title: [_kilobytes(cells[hook, world].handed_bytes) for world in worlds]
        for hook in hooks
        if any(row.handed_bytes is not None for row in rows if row.hook == hook)
    }
    blocks = [text_table("left its sockets, kB a rank and step", heads, theory | sent)]
    if handed:
        blocks.append(text_table("handed to collectives, kB a rank and step", heads, handed))
    return "\n\n".join(blocks)


def _kilobytes(count: float | None) -> str:
    return "failed" if count is None else f"{count / 1e3:.0f}"


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
            marker="o",
            label=HOOKS[hook].title,
        )
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", nargs="+", type=integer_from(2), default=[2, 4, 8, 16])
    parser.add_argument("--hooks", nargs="+", choices=HOOKS, default=list(COLORS))
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the JSON and the PNG")
    options = parser.parse_args(argv)
    rows = [row for world in options.worlds for row in measure_world(world, options.hooks)]
    report = {
        "benchmark": "bytes_vs_world",
        "machine": {"cores": os.cpu_count(), "torch": torch.__version__},
        "settings": {"parameters": PARAMETERS, "pairs": MIN_PAIRS},
        "hooks": {hook: {"title": HOOKS[hook].title} for hook in options.hooks},
        "rows": [asdict(row) for row in rows],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "bytes_vs_world.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(rows, options.out / "bytes_vs_world.png")
    print(table(rows))
    return 1 if any(row.error for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

"""The cost of one training step through the parameter server, dense and top-Q, beside the DDP hook.

    sudo python benchmarks/ps_step.py

Three hosts on shaped links: a server and two workers that train the 10.5 M-parameter MLP of
ddp_step.py. "dense" pushes every gradient whole and brings every parameter back, "top-Q" sends a
hundredth both ways, and the hook is register_topq_hook between the two workers alone. "exchange"
is the median step less the median of the same step with an optimizer of its own, the two taken in
turn. Prints a table, writes runs/ps_step.json and runs/ps_step.png. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib as mpl
import torch
from harness.console import integer_from, option_parser, say, text_table, write_report
from harness.ddp_report import Row, summarize
from harness.ddp_worker import LEARNING_RATE
from harness.netns import (
    INTERFACE,
    LINK_RATES,
    LINK_TITLES,
    Hosts,
    HostsError,
    hosts,
    missing_requirement,
)
from harness.ps_server import ADDRESS, WORKERS, server_on_first_host
from harness.worker_pool import DDP_WORKER, WorkerError, start_workers

mpl.use("Agg")
from matplotlib import pyplot as plt

PS_WORKER = "harness.ps_worker"
NO_SNAPSHOTS = ("--snapshot-every", "1000000")


@dataclass(frozen=True, kw_only=True)
class Way:
    """One row of the table: who exchanges, and how the server answers."""

    title: str
    hook: str
    downlink: tuple[str, ...] = ()
    color: str


WAYS = {
    "ps_dense": Way(
        title="server, dense both ways",
        hook="dense",
        downlink=("--downlink", "dense"),
        color="#4d4d4d",
    ),
    "ps_topq": Way(
        title="server, top-Q both ways",
        hook="topq",
        downlink=(
            *("--downlink", "topq", "--downlink-q", "0.99"),
            *("--downlink-value-format", "fp16"),
        ),
        color="#c0392b",
    ),
    "ps_exact": Way(
        title="server, top-Q up, exact down",
        hook="topq",
        downlink=("--downlink", "exact"),
        color="#7b4173",
    ),
    "hook": Way(title="hook, all-gather", hook="topq_allgather", color="#e8837a"),
}


def measure(link: str, name: str, options: argparse.Namespace) -> tuple[Row, float | None]:
    """Return one way's row on one link, and the bytes that came in to a worker a step."""
    way = WAYS[name]
    say(f"{link}: {way.title}")
    with ExitStack() as stack:
        made = stack.enter_context(hosts(1 + WORKERS, rate=LINK_RATES[link]))
        options_of_server = [*way.downlink, *NO_SNAPSHOTS, "--lr", str(LEARNING_RATE)]
        if way.downlink:
            stack.enter_context(server_on_first_host(made, options_of_server))
        workers = stack.enter_context(
            start_workers(
                WORKERS,
                interface=INTERFACE,
                command=Hosts(namespaces=made.namespaces[1:]).command,
                module=PS_WORKER if way.downlink else DDP_WORKER,
                extra_environment={"TOPQ_BENCH_SERVER": ADDRESS},
            )
        )
        ranks = workers.measure(way.hook, max_pairs=options.steps, budget_s=options.budget_s)
    received = [rank.received_bytes for rank in ranks if rank.received_bytes is not None]
    return summarize(link, name, ranks, None), max(received, default=None)


def table(rows: Sequence[tuple[Row, float | None]]) -> str:
    """Return what is printed: a table a link."""
    tables = []
    for link in dict.fromkeys(row.link for row, _ in rows):
        shown = {row.hook: (row, received) for row, received in rows if row.link == link}
        dense, hook = shown.get("ps_dense"), shown.get("hook")
        cells = {}
        for name, (row, received) in shown.items():
            cells[WAYS[name].title] = [
                f"{row.exchange_ms:.1f} ms",
                _ratio(row, dense[0] if dense else None),
                _ratio(row, hook[0] if hook else None),
                f"{(row.sent_bytes or 0) / 1e3:.0f}",
                "-" if received is None else f"{received / 1e3:.0f}",
            ]
        heads = ["exchange", "of dense", "of the hook", "kB out", "kB in"]
        tables.append(text_table(LINK_TITLES[link], heads, cells))
    return "\n\n".join(tables)


def _ratio(row: Row, other: Row | None) -> str:
    if other is None or not other.exchange_ms or row.exchange_ms is None:
        return "-"
    return f"{row.exchange_ms / other.exchange_ms:.3f}"


def draw(rows: Sequence[tuple[Row, float | None]], path: Path) -> None:
    """Draw the exchange of each way, a panel a link, on log axes."""
    links = list(dict.fromkeys(row.link for row, _ in rows))
    figure, axes = plt.subplots(
        1, len(links), figsize=(4.2 * len(links) + 1.5, 2.8), sharey=True, squeeze=False
    )
    for axis, link in zip(axes[0], links, strict=True):
        shown = [row for row, _ in rows if row.link == link][::-1]
        bars = axis.barh(
            [WAYS[row.hook].title for row in shown],
            [max(1.0, row.exchange_ms or 0.0) for row in shown],
            color=[WAYS[row.hook].color for row in shown],
        )
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.set_xscale("log")
        axis.set_xlim(1, 8 * max(row.exchange_ms or 1.0 for row, _ in rows))
        axis.set_title(LINK_TITLES[link], fontsize=10)
        axis.set_xlabel("exchange, ms a step (log scale)")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = option_parser(__doc__)
    parser.add_argument(
        "--links", nargs="+", choices=LINK_RATES, default=["loopback", "1gbit", "100mbit"]
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=integer_from(3), default=15, help="pairs of steps at most")
    parser.add_argument("--budget-s", type=integer_from(0), default=8)
    options = parser.parse_args(argv)
    reason = missing_requirement()
    if reason is not None:
        say(f"ps_step: {reason}")
        return 2
    try:
        rows = [measure(link, way, options) for link in options.links for way in options.ways]
    except (HostsError, WorkerError) as error:
        say(f"ps_step: {error}")
        return 1
    report = {
        "benchmark": "ps_step",
        "machine": {"cores": os.cpu_count(), "torch": torch.__version__},
        "ways": {name: WAYS[name].title for name in options.ways},
        "rows": [{**asdict(row), "received_bytes": received} for row, received in rows],
    }
    write_report(options.out, "ps_step", report)
    draw(rows, options.out / "ps_step.png")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

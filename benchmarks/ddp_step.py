"""The cost of the gradient exchange in one DDP step, under each hook, on links of several speeds.

    sudo python benchmarks/ddp_step.py

Makes hosts out of network namespaces, starts one process a host, and times a step of a
10.5 M-parameter MLP under dense DDP, torch's own hooks, the plain top-k hook and topq_dist's.
"exchange" is the median step less the median of the same step under no_sync, the two taken in
turn. Prints a table, writes runs/ddp_step.json and runs/ddp_step.png. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from dataclasses import asdict

import torch
from harness.baselines import DEFAULT_HOOKS, HOOKS
from harness.console import integer_from, option_parser, say, write_report
from harness.counters import busy_cores_before
from harness.ddp_report import Row, draw, summarize, table
from harness.ddp_worker import BATCH, PARAMETERS
from harness.netns import (
    DEFAULT_BURST,
    INTERFACE,
    LINK_RATES,
    hosts,
    missing_requirement,
    told_of_ends,
)
from harness.worker_pool import WorkerError, WorkerPool, start_workers


def measure_link(link: str, count: int, options: argparse.Namespace) -> list[Row]:
    """Measure every asked hook on fresh hosts; a hook that fails leaves a row with its error."""
    rows: list[Row] = []
    left = list(options.hooks)
    dense_ms: float | None = None
    with hosts(count, rate=LINK_RATES[link], burst=options.burst) as made:
        while left:
            # a hook that fails takes its workers with it, and the next ones get new workers
            with start_workers(count, interface=INTERFACE, command=made.command) as workers:
                while left:
                    hook = left.pop(0)
                    say(f"{link}, {count} hosts: {HOOKS[hook].title}")
                    row = _measure_hook(workers, link, count, hook, dense_ms, options)
                    rows.append(row)
                    if row.error is not None:
                        say(f"failed: {row.error}")
                        break
                    if hook == "dense":
                        dense_ms = row.exchange_ms
    return rows


def _measure_hook(
    workers: WorkerPool,
    link: str,
    count: int,
    hook: str,
    dense_ms: float | None,
    options: argparse.Namespace,
) -> Row:
    try:
        ranks = workers.measure(hook, max_pairs=options.steps, budget_s=options.budget_s)
    except WorkerError as error:
        return Row(link=link, hosts=count, hook=hook, error=str(error))
    return summarize(link, hook, ranks, dense_ms)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the checked options."""
    parser = option_parser(__doc__)
    parser.add_argument("--links", nargs="+", choices=LINK_RATES, default=list(LINK_RATES))
    parser.add_argument("--hosts", nargs="+", type=integer_from(2), default=[2, 4], metavar="N")
    parser.add_argument(
        "--hooks", nargs="+", choices=HOOKS, default=list(DEFAULT_HOOKS), help="dense is the base"
    )
    parser.add_argument("--steps", type=integer_from(3), default=15, help="pairs of steps at most")
    parser.add_argument(
        "--budget-s",
        type=integer_from(0),
        default=6,
        help="past this, no more than 3 pairs",
    )
    parser.add_argument("--burst", default=DEFAULT_BURST, help="tbf's burst, in tc's words")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure what was asked; return 0, 1 where a hook failed, 2 where hosts cannot be made."""
    options = parse(argv)
    reason = missing_requirement()
    if reason is not None:
        say(f"ddp_step: {reason}")
        return 2
    busy_before = busy_cores_before()
    start = time.monotonic()
    rows: list[Row] = []
    with told_of_ends("ddp_step"):
        for count in options.hosts:
            for link in options.links:
                rows += measure_link(link, count, options)
    report = {
        "benchmark": "ddp_step",
        "machine": {
            "cores": os.cpu_count(),
            "busy_cores_before": round(busy_before, 2),
            "system": platform.system(),
            "torch": torch.__version__,
        },
        "settings": {
            "parameters": PARAMETERS,
            "batch": BATCH,
            "threads_a_rank": 1,
            "tbf_burst": options.burst,
            "duration_s": round(time.monotonic() - start, 1),
        },
        "hooks": {
            name: {"title": HOOKS[name].title, "note": HOOKS[name].note} for name in options.hooks
        },
        "rows": [asdict(row) for row in rows],
    }
    write_report(options.out, "ddp_step", report)
    draw(rows, options.out / "ddp_step.png")
    print(table(rows))
    return 1 if any(row.error for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

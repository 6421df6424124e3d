"""The cost of the rounds of local steps, streamed and not, on links of two speeds.

    sudo python benchmarks/local_steps.py

Makes hosts out of network namespaces, starts one process on each of two, and trains a
10.5 M-parameter MLP with LocalTopQ: periods of 15 inner steps with their rounds, and as many steps
without any, in turn. Prints a table and writes runs/local_steps.json and a picture of the
timelines, with --docs docs/local_timeline.png. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from harness.console import integer_from, option_parser, say, write_report
from harness.counters import busy_cores_before
from harness.ddp_worker import PARAMETERS
from harness.local_report import Row, draw, summarize, table
from harness.local_worker import BATCH, EVERY, METHODS
from harness.netns import (
    DEFAULT_BURST,
    INTERFACE,
    LINK_RATES,
    hosts,
    missing_requirement,
    told_of_ends,
)
from harness.worker_pool import WorkerError, start_workers

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("1gbit", "100mbit")
WORLD_SIZE = 2
# dense rounds that are streamed still take their time to compress
DEFAULT_METHODS = ("top-Q rounds", "top-Q, streamed", "dense rounds (DiLoCo)")
TITLE = f"Local steps between two hosts, {PARAMETERS / 1e6:.1f} M parameters, a round every {EVERY}"


def measure_link(link: str, options: argparse.Namespace) -> list[Row]:
    """Measure every asked method on fresh hosts; one that fails leaves a row with its error."""
    rows: list[Row] = []
    with hosts(WORLD_SIZE, rate=LINK_RATES[link]) as made:
        for method in options.methods:
            say(f"{link}: {method}")
            try:
                with start_workers(
                    WORLD_SIZE,
                    interface=INTERFACE,
                    command=made.command,
                    module="harness.local_worker",
                ) as workers:
                    ranks = workers.measure(method, max_pairs=options.pairs, budget_s=0.0)
            except WorkerError as error:
                say(f"failed: {error}")
                rows.append(Row(link=link, method=method, error=str(error)))
            else:
                rows.append(summarize(link, method, ranks))
    return rows


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the checked options."""
    parser = option_parser(__doc__)
    parser.add_argument("--links", nargs="+", choices=LINK_RATES, default=list(LINKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(DEFAULT_METHODS))
    parser.add_argument("--pairs", type=integer_from(1), default=5, help="pairs of blocks")
    parser.add_argument("--docs", action="store_true", help="put the picture into docs/")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure what was asked; return 0, 1 where a method failed, 2 where hosts cannot be made."""
    options = parse(argv)
    reason = missing_requirement()
    if reason is not None:
        say(f"local_steps: {reason}")
        return 2
    busy_before = busy_cores_before()
    start_s = time.monotonic()
    rows: list[Row] = []
    with told_of_ends("local_steps"):
        for link in options.links:
            rows += measure_link(link, options)
    report = {
        "benchmark": "local_steps",
        "machine": {
            "cores": os.cpu_count(),
            "busy_cores_before": round(busy_before, 2),
            "system": platform.system(),
            "torch": torch.__version__,
        },
        "settings": {
            "parameters": PARAMETERS,
            "batch": BATCH,
            "every": EVERY,
            "hosts": WORLD_SIZE,
            "threads_a_rank": 1,
            "tbf_burst": DEFAULT_BURST,
            "duration_s": round(time.monotonic() - start_s, 1),
            "methods": {name: METHODS[name] for name in options.methods},
        },
        # timelines are for the picture
        "rows": [{**asdict(row), "timeline": None} for row in rows],
    }
    write_report(options.out, "local_steps", report)
    draw(rows, TITLE, (ROOT / "docs" if options.docs else options.out) / "local_timeline.png")
    print(table(rows))
    return 1 if any(row.error for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

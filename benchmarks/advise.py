"""Predicted steps beside measured ones: `topq_dist.advise` on links of several speeds.

    sudo python benchmarks/advise.py

Makes hosts out of network namespaces, starts one process a host, asks for advice on a step of a
10.5 M-parameter MLP, and then times the steps that it has predicted. Prints a table and writes
runs/advise.json. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

import torch
from harness.advise_worker import ADVISE, BUDGET_S, QS, VALUE_FORMATS, topq_job
from harness.console import integer_from, option_parser, say, text_table, write_report
from harness.counters import busy_cores_before
from harness.ddp_worker import BATCH, PARAMETERS, Measurement
from harness.netns import (
    DEFAULT_BURST,
    INTERFACE,
    LINK_RATES,
    LINK_TITLES,
    HostsError,
    hosts,
    missing_requirement,
)
from harness.worker_pool import WorkerError, start_workers

from topq_dist.advice.command import parse_rate

# the links of hosts without a rate have none to be predicted by
UNSHAPED = "loopback"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A step predicted and measured, in milliseconds; `alone_ms` by the link's rate alone.

    The latter takes compute and engine from the ranks without a rate, and no latency.
    """

    link: str
    hosts: int
    method: str
    predicted_ms: float
    measured_ms: float
    compute_ms: float
    engine_ms: float
    link_ms: float
    alone_ms: float | None = None

    @property
    def error(self) -> float:
        """How much more was predicted than measured, as a share of what was measured."""
        return self.predicted_ms / self.measured_ms - 1.0


def measure_link(
    link: str, count: int, options: argparse.Namespace, unshaped: dict[str, Any] | None
) -> tuple[list[Row], dict[str, Any]]:
    """Return predictions beside measurements on fresh hosts, and the advice itself.

    unshaped: the advice on hosts without a rate, where it is known.
    """
    rows: list[Row] = []
    with (
        hosts(count, rate=LINK_RATES[link]) as made,
        start_workers(
            count, interface=INTERFACE, command=made.command, module="harness.advise_worker"
        ) as workers,
    ):
        say(f"{link}, {count} hosts: {ADVISE}")
        ranks = workers.measure(ADVISE, max_pairs=options.steps, budget_s=options.budget_s)
        advice = ranks[0].timeline
        if advice is None or any(rank.timeline != advice for rank in ranks):
            raise WorkerError("ranks were advised differently")
        for one in advice["predictions"]:
            job = _job(one["method"])
            if job is None:
                continue
            say(f"{link}, {count} hosts: {one['title']}")
            found = workers.measure(job, max_pairs=options.steps, budget_s=options.budget_s)
            rows.append(_row(link, count, one, found, unshaped))
    return rows, advice


def _job(method: dict[str, Any]) -> str | None:
    """Return the job that measures a method, None of one that no hook is."""
    if method["kind"] == "PowerSGD":
        return f"powersgd{method['power_rank']}"
    if method["kind"] == "top-Q":
        return topq_job(method["q"], method["value_format"], method["exchange"])
    return method["kind"] if method["kind"] in ("dense", "fp16") else None


def _row(
    link: str,
    count: int,
    one: dict[str, Any],
    ranks: list[Measurement],
    unshaped: dict[str, Any] | None,
) -> Row:
    step_s = statistics.median(map(max, zip(*(rank.step_s for rank in ranks), strict=True)))
    rate = LINK_RATES[link]
    alone_ms = None
    if unshaped is not None and rate is not None:
        there = next(o for o in unshaped["predictions"] if o["title"] == one["title"])
        link_s = 8 * there["wire_bytes"] / parse_rate(rate)
        alone_ms = 1e3 * (there["compute_s"] + there["engine_s"] + link_s)
    return Row(
        link=link,
        hosts=count,
        method=one["title"],
        predicted_ms=1e3 * one["step_s"],
        measured_ms=1e3 * step_s,
        compute_ms=1e3 * one["compute_s"],
        engine_ms=1e3 * one["engine_s"],
        link_ms=1e3 * one["link_s"],
        alone_ms=alone_ms,
    )


def table(rows: list[Row]) -> str:
    """Return what is printed: for each number of hosts the steps by method and link."""
    blocks = []
    for count in dict.fromkeys(row.hosts for row in rows):
        here = [row for row in rows if row.hosts == count]
        links = list(dict.fromkeys(row.link for row in here))
        shown = {(row.method, row.link): _cell(row) for row in here}
        lines = {
            method: [shown.get((method, link), "-") for link in links]
            for method in sorted({row.method for row in here})
        }
        title = f"{count} hosts: predicted / measured ms a step"
        blocks.append(text_table(title, [LINK_TITLES[link] for link in links], lines))
    return "\n\n".join(blocks)


def _cell(row: Row) -> str:
    return f"{row.predicted_ms:.0f} / {row.measured_ms:.0f} ({100 * row.error:+.0f} %)"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the checked options."""
    parser = option_parser(__doc__)
    parser.add_argument("--links", nargs="+", choices=LINK_RATES, default=list(LINK_RATES))
    parser.add_argument("--hosts", nargs="+", type=integer_from(2), default=[2, 4], metavar="N")
    parser.add_argument("--steps", type=integer_from(3), default=15, help="pairs of steps at most")
    parser.add_argument(
        "--budget-s", type=integer_from(0), default=3, help="past this, no more than 3 pairs"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measure what was asked; return 0, 1 where a rank failed, 2 where hosts cannot be made."""
    options = parse(argv)
    reason = missing_requirement()
    if reason is not None:
        say(f"advise: {reason}")
        return 2
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, _leave)
    busy_before = busy_cores_before()
    start_s = time.monotonic()
    rows: list[Row] = []
    advised: list[dict[str, Any]] = []

    def write() -> None:
        settings = {
            "parameters": PARAMETERS,
            "batch": BATCH,
            "threads_a_rank": 1,
            "tbf_burst": DEFAULT_BURST,
            "qs": QS,
            "value_formats": VALUE_FORMATS,
            "advice_budget_s": BUDGET_S,
            "duration_s": round(time.monotonic() - start_s, 1),
        }
        machine = {
            "cores": os.cpu_count(),
            "busy_cores_before": round(busy_before, 2),
            "system": platform.system(),
            "torch": torch.__version__,
        }
        report = {
            "benchmark": "advise",
            "machine": machine,
            "settings": settings,
            "rows": [{**asdict(row), "error": round(row.error, 3)} for row in rows],
            "advised": advised,
        }
        write_report(options.out, "advise", report)

    try:
        for count in options.hosts:
            unshaped = None
            for link in options.links:
                found, advice = measure_link(link, count, options, unshaped)
                unshaped = advice if link == UNSHAPED else unshaped
                rows += found
                advised.append({"link": link, "hosts": count, "advice": advice})
                write()
    except HostsError as error:
        say(f"advise: {error}")
        return 2
    except WorkerError as error:
        say(f"advise: failed: {error}")
        return 1
    except KeyboardInterrupt:
        say("advise: interrupted, hosts removed")
        return 130
    print(table(rows))
    return 0


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())

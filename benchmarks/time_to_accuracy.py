"""The time that training takes to dense's accuracy between two hosts on a slow link, by method.

    sudo python benchmarks/time_to_accuracy.py          # minutes a seed, needs root and iproute2
    python benchmarks/time_to_accuracy.py --quick       # half a minute, at loopback speed

Two hosts out of network namespaces, one rank each on one thread, train an MLP of 7.9 M parameters
on Fashion-MNIST (Debian's package dataset-fashion-mnist) with dense DDP, torch's hooks, and
`register_topq_hook(model, optimizer)` with nothing set: the same seeds, order, steps, rates and
momentum, the rate being dense's best. The target is what dense ends on, less half a point; the
clock counts every step from the first one on, warm-up and trials included, and stands still while
the ranks evaluate.

Dense and fp16 send the same whatever the link is, and on a slow one take minutes to do so. They are
trained at loopback speed for their curves, and only 15 of their steps are measured on each link:
their seconds are steps times the median of these, their bytes likewise. All others are trained on
the link from start to end. Prints a table, and writes time_to_accuracy.json and a picture.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from harness.console import integer_from, option_parser, say, write_report
from harness.counters import busy_cores_before
from harness.netns import (
    DEFAULT_BURST,
    INTERFACE,
    LINK_RATES,
    hosts,
    missing_requirement,
    told_of_ends,
)
from harness.time_to_accuracy_report import (
    ESTIMATED_NOTE,
    POINTS_BELOW_DENSE,
    Curve,
    Row,
    curve_of,
    draw,
    failed,
    row_of,
    slowest_ms,
    table,
    target_of,
    with_target,
)
from harness.time_to_accuracy_worker import (
    BASELINES,
    TITLES,
    TOPQ,
    WORLD_SIZE,
    Job,
    Outcome,
    Recipe,
)
from harness.worker_pool import ERROR_TAIL_LINES, WorkerError, killed_at_the_end, worker_environment

# the worker's import has put benchmarks/experiments on the path
import datasets  # isort: skip

ROOT = Path(__file__).resolve().parents[1]
WORKER = "harness.time_to_accuracy_worker"
RUN_LIMIT_S = 600.0
LOOPBACK = "loopback"
LINKS = ("100mbit", "1gbit")
# what they send depends on nothing but the model
LINK_FREE = ("dense", "fp16")
TIMED_STEPS, TIMED_WARM_UP = 15, 2
FULL = Recipe(
    data="fashion-mnist",
    hidden=(2048, 2048, 1024),
    batch=16,
    # dense ends on 82.7, 83.4, 83.3 and 81.6 % of 2,000 validation images at .01 (two seeds), .02,
    # .05 and .1 (three)
    lr=0.02,
    momentum=0.9,
    steps=300,
    evaluate_every=20,
    test_images=2000,
)
QUICK = replace(FULL, data="digits", hidden=(64, 32), steps=40, evaluate_every=10, test_images=200)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A place for ranks: how a command is run for a rank, and the interface they talk through.

    shared: whether that interface is everybody's, so that nobody knows who sent what.
    """

    command: Callable[[int, Sequence[str]], Sequence[str]]
    interface: str
    shared: bool


HERE = Place(command=lambda rank, argv: argv, interface="lo", shared=True)


@contextmanager
def place_of(link: str) -> Iterator[Place]:
    """Make the hosts of a link for the block; loopback speed needs none."""
    if link == LOOPBACK:
        yield HERE
        return
    with hosts(WORLD_SIZE, rate=LINK_RATES[link]) as made:
        yield Place(command=made.command, interface=INTERFACE, shared=False)


def run_ranks(place: Place, job: Job) -> list[Outcome]:
    """Return each rank's outcome of a job, from a fresh process a rank.

    Raises WorkerError where one ends with an error or they take too long; no process is left.
    """
    environment = worker_environment(place.interface)
    with tempfile.TemporaryDirectory(prefix="topq-bench-") as folder, ExitStack() as stack:
        counted = None if place.shared else place.interface
        jobs = [
            replace(job, rank=rank, folder=folder, interface=counted) for rank in range(WORLD_SIZE)
        ]
        errors = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in jobs]
        with killed_at_the_end() as workers:
            for one, output in zip(jobs, errors, strict=True):
                argv = [sys.executable, "-m", WORKER, json.dumps(asdict(one))]
                workers.append(
                    subprocess.Popen(
                        place.command(one.rank, argv),
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        text=True,
                        env=environment,
                        process_group=0,  # Ctrl-C is for the one who cleans up
                    )
                )
            _wait(workers, errors)
        return [Outcome(**json.loads(one.answer_path().read_text())) for one in jobs]


def _wait(workers: Sequence[subprocess.Popen[str]], errors: Sequence[IO[str]]) -> None:
    deadline = time.monotonic() + RUN_LIMIT_S
    while (ended := [worker.poll() for worker in workers]) != [0] * len(workers):
        for rank, status in enumerate(ended):
            # the others would wait for this one until their collectives give up
            if status:
                errors[rank].seek(0)
                tail = errors[rank].read().splitlines()[-ERROR_TAIL_LINES:]
                raise WorkerError("\n".join((f"rank {rank} ended with status {status}:", *tail)))
        if time.monotonic() > deadline:
            raise WorkerError(f"not done within {RUN_LIMIT_S:.0f} s")
        time.sleep(0.05)


class Benchmark:
    """The runs that were asked for; what does not depend on the link is trained once."""

    def __init__(self, recipe: Recipe, seeds: Sequence[int], timed_steps: int) -> None:
        self._recipe = recipe
        self._seeds = seeds
        self._timed_steps = timed_steps
        self._link_free: dict[str, list[Curve]] = {}
        self.parameters: int | None = None

    def measure(self, links: Sequence[str], methods: Sequence[str]) -> list[Row]:
        """Return a row a link and method; one that fails leaves its error."""
        rows = []
        for link in links:
            with place_of(link) as place:
                for method in methods:
                    try:
                        rows.append(self._row(link, place, method))
                    except WorkerError as error:
                        say(f"failed: {error}")
                        rows.append(failed(link, method, str(error)))
        return rows

    def target(self, rows: Sequence[Row]) -> float | None:
        """Return the accuracy to reach, None where dense has none."""
        dense = [row.curves for row in rows if row.method == "dense" and row.curves]
        return target_of(dense[0]) if dense else None

    def _row(self, link: str, place: Place, method: str) -> Row:
        if method not in LINK_FREE:
            return row_of(link, method, self._train(link, place, method), estimated=False)
        if method not in self._link_free:
            self._link_free[method] = self._train(LOOPBACK, HERE, method)
        curves = self._link_free[method]
        if link == LOOPBACK:
            return row_of(link, method, curves, estimated=False)
        say(f"{link}: {TITLES[method]}, {self._timed_steps} steps")
        job = self._job(method, self._seeds[0], TIMED_WARM_UP + self._timed_steps)
        ranks = run_ranks(place, job)
        step_ms = slowest_ms(ranks, skip=TIMED_WARM_UP)
        step_bytes = max(rank.sent_bytes[-1] for rank in ranks) / job.run_steps
        return row_of(
            link, method, [curve.at_pace(step_ms, step_bytes) for curve in curves], estimated=True
        )

    def _train(self, link: str, place: Place, method: str) -> list[Curve]:
        curves = []
        for seed in self._seeds:
            say(f"{link}: {TITLES[method]}, seed {seed}")
            ranks = run_ranks(place, self._job(method, seed, self._recipe.steps))
            self.parameters = ranks[0].parameters
            curves.append(curve_of(ranks))
        return curves

    def _job(self, method: str, seed: int, run_steps: int) -> Job:
        return Job(recipe=self._recipe, method=method, seed=seed, run_steps=run_steps)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the checked options."""
    parser = option_parser(__doc__)
    parser.add_argument("--links", nargs="+", choices=LINK_RATES, help="default: both slow ones")
    parser.add_argument(
        "--methods", nargs="+", choices=TITLES, default=[*BASELINES, TOPQ], help="dense is the base"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one takes minutes")
    parser.add_argument("--steps", type=integer_from(1), help=f"default: {FULL.steps}")
    parser.add_argument("--lr", type=float, help=f"default: {FULL.lr}, dense's best")
    parser.add_argument("--docs", action="store_true", help="put the picture into docs/")
    parser.add_argument(
        "--quick", action="store_true", help="a small model, few steps, loopback speed, no root"
    )
    options = parser.parse_args(argv)
    if "dense" not in options.methods:
        parser.error("--methods: expected dense among them, whose accuracy is the target")
    recipe = QUICK if options.quick else FULL
    options.recipe = replace(
        recipe, steps=options.steps or recipe.steps, lr=options.lr or recipe.lr
    )
    options.links = options.links or ([LOOPBACK] if options.quick else list(LINKS))
    options.timed_steps = 3 if options.quick else TIMED_STEPS
    if options.quick:
        options.seeds = options.seeds[:1]
    return options


def main(argv: list[str] | None = None) -> int:
    """Measure what was asked; return 0, 1 where a method failed, 2 where it cannot be measured."""
    options = parse(argv)
    reason = missing_requirement() if set(options.links) != {LOOPBACK} else None
    if reason is not None:
        say(f"time_to_accuracy: {reason}")
        return 2
    busy_before = busy_cores_before()
    start_s = time.monotonic()
    benchmark = Benchmark(options.recipe, options.seeds, options.timed_steps)
    try:
        # once and here: two workers would write the same file
        datasets.load(options.recipe.data)
    except datasets.DataError as error:
        say(f"time_to_accuracy: {error}")
        return 2
    with told_of_ends("time_to_accuracy"):
        rows = benchmark.measure(options.links, options.methods)
    target = benchmark.target(rows)
    rows = with_target(rows, target)
    report = {
        **_settings(options, benchmark.parameters),
        "busy_cores_before": round(busy_before, 2),
        "duration_s": round(time.monotonic() - start_s, 1),
        "target": target,
        "rows": [asdict(row) for row in rows],
    }
    write_report(options.out, "time_to_accuracy", report)
    size = f"an MLP of {(benchmark.parameters or 0) / 1e6:.1f} M parameters"
    title = f"{options.recipe.data} between {WORLD_SIZE} hosts, {size}"
    folder = ROOT / "docs" if options.docs else options.out
    draw(rows, target, title, folder / "time_to_accuracy.png")
    print(table(rows, target))
    return 1 if any(row.error for row in rows) else 0


def _settings(options: argparse.Namespace, parameters: int | None) -> dict[str, Any]:
    """Return what a reader needs to know about the rows."""
    return {
        "benchmark": "time_to_accuracy",
        "machine": {
            "cores": os.cpu_count(),
            "system": platform.system(),
            "torch": torch.__version__,
        },
        "settings": {
            **asdict(options.recipe),
            "parameters": parameters,
            "hosts": WORLD_SIZE,
            "threads_a_rank": 1,
            "seeds": options.seeds,
            "timed_steps": options.timed_steps,
            "tbf_burst": DEFAULT_BURST,
            "points_below_dense": POINTS_BELOW_DENSE,
        },
        "estimated": ESTIMATED_NOTE.removeprefix("* "),
        "methods": {name: TITLES[name] for name in options.methods},
    }


if __name__ == "__main__":
    sys.exit(main())

"""Trains every task of the report with every method, and writes docs/convergence.md from it.

    python benchmarks/convergence.py                 # all of it, hours; resumes where it stopped
    python benchmarks/convergence.py --only gpt-moby --steps 1000 --seeds 0
    python benchmarks/convergence.py --report        # tables and pictures from what there is
    python benchmarks/convergence.py --quick         # minutes: a few steps of each, none kept

Runs are independent: `--jobs` of them go on at once, one thread each, and each adds a line to
benchmarks/results/convergence.jsonl when it is done. W ranks are emulated in one process through
the hook's own compressor, residuals and momentum (experiments/emulated_ranks.py).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).with_name("experiments")))

RESULTS = Path(__file__).with_name("results") / "convergence.jsonl"
SEEDS = (0, 1, 2)
QUICK_STEPS = 12


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: names of a task and of a method, and how long with how many ranks."""

    task: str
    method: str
    seed: int
    workers: int
    steps: int

    @property
    def key(self) -> tuple[str, str, int, int, int]:
        """The things that make a run the same as one that is done."""
        return (self.task, self.method, self.seed, self.workers, self.steps)


def jobs_of(plan: Sequence[dict[str, Any]]) -> Iterator[Job]:
    """Return the runs of a plan, row by row and seed by seed."""
    for row in plan:
        for seed in row["seeds"]:
            for method in row["methods"]:
                yield Job(
                    task=row["task"],
                    method=method,
                    seed=seed,
                    workers=row["workers"],
                    steps=row["steps"],
                )


def done_keys(path: Path) -> set[tuple[str, str, int, int, int]]:
    """Return the keys of the runs in a file, those of earlier versions left out."""
    if not path.is_file():
        return set()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        (r["task"], r["method"], r["seed"], r["workers"], r["steps"])
        for r in rows
        if not r.get("earlier")
    }


def run(job: Job) -> dict[str, Any]:
    """Train, and return the line of the results."""
    import torch
    from emulated_ranks import train
    from methods import METHODS
    from tasks import TASKS, load_data

    torch.set_num_threads(1)
    began_s = time.perf_counter()
    task = TASKS[job.task]
    outcome = train(
        task,
        load_data(task),
        METHODS[job.method],
        seed=job.seed,
        workers=job.workers,
        steps=job.steps,
        evaluate_every=max(QUICK_STEPS, job.steps // 15),
    )
    return {**asdict(job), **asdict(outcome), "wall_s": round(time.perf_counter() - began_s, 1)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="TASK", help="no other tasks")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="no other methods")
    parser.add_argument("--steps", nargs="+", type=int, help="no other lengths")
    parser.add_argument("--workers", nargs="+", type=int, help="no other numbers of ranks")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--results", type=Path, help="file of the runs that are done")
    parser.add_argument("--report", action="store_true", help="only write the report")
    parser.add_argument("--quick", action="store_true", help="a few steps of each task, no report")
    options = parser.parse_args(argv)
    from methods import PLAN

    wanted = [
        job
        for job in jobs_of(PLAN)
        if (not options.only or job.task in options.only)
        and (not options.methods or job.method in options.methods)
        and (not options.steps or job.steps in options.steps)
        and (not options.workers or job.workers in options.workers)
        and job.seed in options.seeds
    ]
    if options.quick:
        first = {(job.task, job.method): job for job in reversed(wanted)}
        wanted = [Job(**{**asdict(job), "steps": QUICK_STEPS}) for job in first.values()]
    if options.quick and options.results is None:
        # lines of a few steps are none of the report's
        with tempfile.TemporaryDirectory() as folder:
            _run_all(wanted, Path(folder) / RESULTS.name, options.jobs)
        return
    results = options.results or RESULTS
    if not options.report:
        _run_all(wanted, results, options.jobs)
    if not options.quick:
        from convergence_report import write_report

        write_report(results)


def _run_all(wanted: Sequence[Job], results: Path, jobs: int) -> None:
    done = done_keys(results)
    left = [job for job in wanted if job.key not in done]
    print(f"{len(left)} of {len(wanted)} runs to do", file=sys.stderr, flush=True)
    if not left:
        return
    results.parent.mkdir(parents=True, exist_ok=True)
    # spawned, so that no run inherits another's threads or memory
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=4) as pool:
        for place, line in enumerate(pool.imap_unordered(run, left), start=1):
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(
                f"{place}/{len(left)} {line['task']} {line['method']} x{line['workers']} "
                f"{line['steps']} steps seed {line['seed']}: {line['validation']:.4f} "
                f"at {line['ratio']:.0f} x, {line['wall_s']:.0f} s",
                file=sys.stderr,
                flush=True,
            )


if __name__ == "__main__":
    main()

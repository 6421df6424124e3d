"""The runs that convergence.py has done, in groups that can be compared."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from methods import METHODS, PLAN
from tasks import TASKS, Task

# marks rows of earlier versions
EARLIER = "\u2020"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One line of the results. curve: (step, validation quality).

    sent_bytes: of one rank's frames in all steps; older lines do not say.
    earlier: of a version whose hook trained a little differently; such a run is done again.
    """

    task: str
    method: str
    seed: int
    workers: int
    steps: int
    validation: float
    test: float
    train_loss: float
    highest_loss: float
    ratio: float
    curve: list[tuple[int, float]]
    sent_bytes: int | None = None
    earlier: bool = False

    @property
    def failed(self) -> bool:
        """Whether a loss of a step or a result was infinite or not a number."""
        measured = (self.validation, self.test, self.train_loss, self.highest_loss)
        return not all(map(math.isfinite, measured))


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of one task, number of ranks and number of steps, by method and by seed.

    expected: the methods that the plan has, in its order; `runs` may lack some and have others.
    """

    task: Task
    workers: int
    steps: int
    expected: tuple[str, ...]
    runs: dict[str, dict[int, Run]]

    @property
    def methods(self) -> list[str]:
        """All methods, the plan's first."""
        others = sorted(self.runs.keys() - set(self.expected), key=_place)
        return [*self.expected, *others]

    def is_earlier(self, method: str) -> bool:
        """Return whether a run of the method is of an earlier version."""
        return any(run.earlier for run in self.runs.get(method, {}).values())

    def mean(self, method: str, field: str, seeds: Sequence[int] | None = None) -> float:
        """Return the mean of a field over these seeds, or over those there are."""
        runs = self.runs[method]
        return statistics.fmean(
            getattr(run, field) for seed, run in runs.items() if seeds is None or seed in seeds
        )

    def common_seeds(self, *methods: str) -> list[int]:
        """Return the seeds that all of these methods have."""
        return sorted(set.intersection(*(set(self.runs.get(name, {})) for name in methods)))

    def difference(self, method: str, field: str, reference: str = "dense") -> float | None:
        """Return points of accuracy or per cent of loss above the reference; None without seeds."""
        seeds = self.common_seeds(method, reference)
        if not seeds:
            return None
        ours, theirs = (self.mean(name, field, seeds) for name in (method, reference))
        if self.task.quality == "accuracy":
            return ours - theirs
        return 100.0 * (ours / theirs - 1.0)


def read_runs(results: Path) -> list[Run]:
    """Return the runs of a file, of equal ones the last; none where there is no file."""
    if not results.is_file():
        return []
    known = {field.name for field in fields(Run)}
    runs = {}
    for line in results.read_text().splitlines():
        found = {name: value for name, value in json.loads(line).items() if name in known}
        run = Run(**found)
        runs[run.task, run.method, run.seed, run.workers, run.steps] = run
    return list(runs.values())


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """Return the plan's groups, task by task in its order, then what else there is."""
    planned: dict[tuple[str, int, int], dict[str, None]] = {}
    for row in PLAN:
        key = (row["task"], row["workers"], row["steps"])
        planned.setdefault(key, {}).update(dict.fromkeys(row["methods"]))
    for run in runs:
        planned.setdefault((run.task, run.workers, run.steps), {})
    order = list(dict.fromkeys(task for task, _, _ in planned))
    groups = []
    for task, workers, steps in sorted(
        planned, key=lambda key: (order.index(key[0]), key[2], -key[1])
    ):
        mine = [r for r in runs if (r.task, r.workers, r.steps) == (task, workers, steps)]
        by_method: dict[str, dict[int, Run]] = {}
        for run in sorted(mine, key=lambda run: run.seed):
            by_method.setdefault(run.method, {})[run.seed] = run
        groups.append(
            Group(
                task=TASKS[task],
                workers=workers,
                steps=steps,
                expected=tuple(planned[task, workers, steps]),
                runs=by_method,
            )
        )
    return groups


def _place(method: str) -> int:
    return list(METHODS).index(method) if method in METHODS else len(METHODS)


def quality_text(task: Task, quality: float) -> str:
    """Return an accuracy or a loss as text, NaN and infinity as such."""
    if not math.isfinite(quality):
        return "NaN" if math.isnan(quality) else "infinite"
    return f"{quality:.2f}" if task.quality == "accuracy" else f"{quality:.4f}"


def difference_text(task: Task, difference: float | None) -> str:
    """Return a difference to dense as text."""
    if difference is None:
        return "no dense run"
    if not math.isfinite(difference):
        return "failed"
    return f"{difference:+.2f}" if task.quality == "accuracy" else f"{difference:+.2f} %"

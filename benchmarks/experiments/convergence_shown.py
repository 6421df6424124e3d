"""The promises of the defaults, beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from convergence_runs import EARLIER, Group, difference_text
from methods import FORMATS, METHODS
from readme import markdown

Groups = dict[tuple[str, int, int], Group]
_ONE_PER_CENT = "top-Q, q=0.99"
_BOUNDED = 2.0
_SEEDS = 3
_HEADS = ["task", "ranks, steps", "method", "times fewer", "test, to dense"]
_HEADS += ["validation, to dense", "target", "result"]


@dataclass(frozen=True, kw_only=True)
class Promise:
    """A method that sends at least `fewer` times less and ends `within` of dense, or better.

    within: points of accuracy or per cent of loss; None where the result is only reported.
    """

    task: str
    workers: int = 4
    steps: int
    method: str = "top-Q"
    fewer: float | None = 100.0
    within: float | None


def _gpts(*, steps: int, within: float, workers: int = 4) -> list[Promise]:
    return [
        Promise(task=f"gpt-{text}", workers=workers, steps=steps, within=within)
        for text in ("moby", "shakespeare")
    ]


def _promises() -> Iterator[Promise]:
    for optimizer in ("sgd", "adamw"):
        task = f"cifar10-{optimizer}"
        for steps, within_rare in ((1500, 3.0), (4500, 1.0)):
            yield Promise(task=task, steps=steps, within=0.5)
            yield Promise(
                task=task, steps=steps, method="top-Q, q=0.9982", fewer=900.0, within=within_rare
            )
    yield from _gpts(steps=1000, within=0.5)
    yield from _gpts(steps=3000, within=0.5)
    yield from _gpts(steps=1000, within=1.5, workers=2)
    for text in ("moby", "shakespeare"):
        for steps, within in ((1000, 3.0), (3000, 1.0)):
            yield Promise(
                task=f"gpt-{text}", steps=steps, method=_ONE_PER_CENT, fewer=280.0, within=within
            )
    for data in ("onecycle", "cycles"):
        yield Promise(
            task=f"tied-{data}", steps=200, method=_ONE_PER_CENT, fewer=None, within=200.0
        )
    for method, steps, fewer, within in (
        ("local, H=5", 1000, 500.0, 6.0),
        ("local, H=5", 3000, 500.0, 2.5),
        ("local, H=2", 1000, 150.0, 3.0),
        ("local, H=2", 3000, 150.0, 1.0),
        ("local, H=5", 1000, 400.0, 3.0),
        ("local, H=5", 3000, 400.0, 1.0),
        ("local, H=4, ec1", 1000, 1000.0, 8.0),
        ("local, H=4, ec1", 3000, 1000.0, 3.0),
    ):
        yield Promise(task="gpt-moby", steps=steps, method=method, fewer=fewer, within=within)
    for method, steps, fewer, within in (
        ("local with momentum, H=5", 4500, 500.0, 2.0),
        ("top-Q, q=0.99", 1500, 250.0, 1.0),
        ("top-Q, q=0.9985", 1500, 1000.0, 2.0),
        ("top-Q, q=0.9985", 4500, 1000.0, 0.5),
    ):
        yield Promise(task="cifar10-sgd", steps=steps, method=method, fewer=fewer, within=within)
    # not tuned on: reported as they come
    yield Promise(task="lstm-moby", steps=1000, within=None)
    yield Promise(task="recommender", steps=1000, within=None)


def shown_table(groups: Sequence[Group]) -> str:
    """Return a row for each promise; what was not run says so."""
    known = {(group.task.name, group.workers, group.steps): group for group in groups}
    rows = [_row(promise, known) for promise in _promises()]
    rows += [_formats_row(known), _bounded_row(known)]
    return markdown(_HEADS, rows)


def _row(promise: Promise, groups: Groups) -> list[str]:
    group = groups.get((promise.task, promise.workers, promise.steps))
    place = [promise.task, f"{promise.workers}, {promise.steps:,}", promise.method]
    if group is None or not group.common_seeds(promise.method, "dense"):
        return [*place, "", "", "", _target(promise, group), "not run"]
    ratio = group.mean(promise.method, "ratio")
    test, validation = (group.difference(promise.method, part) for part in ("test", "validation"))
    return [
        *place,
        f"{ratio:.0f} x",
        difference_text(group.task, test),
        difference_text(group.task, validation),
        _target(promise, group),
        _verdict(promise, group) + f" {EARLIER}" * group.is_earlier(promise.method),
    ]


def _target(promise: Promise, group: Group | None) -> str:
    if promise.within is None:
        return "none"
    parts = [] if promise.fewer is None else [f"{promise.fewer:g} x"]
    if group is None or group.task.quality == "loss":
        return ", ".join([*parts, f"+{promise.within:g} %"])
    return ", ".join([*parts, f"-{promise.within:g}"])


def _verdict(promise: Promise, group: Group) -> str:
    """Return whether test and validation are both as promised, and what is to be known of it."""
    count = len(group.common_seeds(promise.method, "dense"))
    if any(run.failed for run in group.runs[promise.method].values()):
        return "**missed**: a run failed"
    if promise.within is None:
        return _with_seeds("reported", count)
    if any(run.failed for run in group.runs["dense"].values()):
        return "none: dense failed"
    if promise.fewer is not None and group.mean(promise.method, "ratio") < promise.fewer:
        return "**missed**: too many bytes"
    sign = -1.0 if group.task.quality == "accuracy" else 1.0
    met = {
        part: sign * (group.difference(promise.method, part) or 0.0) <= promise.within
        for part in ("test", "validation")
    }
    if len(set(met.values())) == 1:
        return _with_seeds("met" if met["test"] else "**missed**", count)
    mixed = ", ".join(f"{'met' if is_met else '**missed**'} on {p}" for p, is_met in met.items())
    return _with_seeds(mixed, count)


def _with_seeds(text: str, count: int) -> str:
    if count == _SEEDS:
        return text
    return f"{text} ({count} seed{'s' if count > 1 else ''})"


def _formats_row(groups: Groups) -> list[str]:
    """Return how far the worst value format is from the best, each at one per cent."""
    task, workers, steps, within = "gpt-moby", 4, 1000, 5.0
    place = [task, f"{workers}, {steps:,}", "every value format at 1 %"]
    # int2 is the default, which is not in the name
    names = {
        _ONE_PER_CENT if name == METHODS[_ONE_PER_CENT].value_format
        else f"{_ONE_PER_CENT}, {name}": name
        for name in FORMATS
    }  # fmt: skip
    target = f"worst +{within:g} % of best"
    group = groups.get((task, workers, steps))
    missing = [name for method, name in names.items() if group is None or method not in group.runs]
    if group is None or missing:
        return [*place, "", "", "", target, f"not run: {', '.join(missing)}"]
    seeds = group.common_seeds(*names)
    if not seeds:
        return [*place, "", "", "", target, "not run: no seed with all of them"]
    ratios = [group.mean(method, "ratio") for method in names]
    ratio = f"{min(ratios):.0f} to {max(ratios):.0f} x"
    if any(run.failed for method in names for run in group.runs[method].values()):
        return [*place, ratio, "failed", "failed", target, "**missed**: a run failed"]
    cells, met = [], True
    for part in ("test", "validation"):
        means = {name: group.mean(method, part, seeds) for method, name in names.items()}
        worst = max(means, key=lambda name: means[name])
        spread = 100.0 * (means[worst] / min(means.values()) - 1.0)
        cells.append(f"{worst} {spread:+.2f} % of best")
        met = met and spread <= within
    result = _with_seeds("met" if met else "**missed**", len(seeds))
    return [*place, ratio, *cells, target, result]


def _bounded_row(groups: Groups) -> list[str]:
    """Return whether the tied transformer ever diverged: the highest loss of any step."""
    task, workers, steps = "tied-onecycle", 4, 200
    place = [task, f"{workers}, {steps:,}", f"{_ONE_PER_CENT}: highest loss of a step"]
    target = f"{_BOUNDED:g} x dense's highest"
    group = groups.get((task, workers, steps))
    if group is None or not group.common_seeds(_ONE_PER_CENT, "dense"):
        return [*place, "", "", "", target, "not run"]
    ours, dense = (
        max(run.highest_loss for run in group.runs[method].values())
        for method in (_ONE_PER_CENT, "dense")
    )
    measured = f"{ours:.1f}, dense {dense:.1f}" if math.isfinite(ours) else "infinite"
    result = "met" if ours <= _BOUNDED * dense else "**missed**"
    ratio = f"{group.mean(_ONE_PER_CENT, 'ratio'):.0f} x"
    count = len(group.common_seeds(_ONE_PER_CENT, "dense"))
    return [*place, ratio, measured, "", target, _with_seeds(result, count)]

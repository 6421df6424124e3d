"""Tables of docs/convergence.md and its pictures, from the lines that convergence.py writes."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from convergence_pictures import draw
from convergence_runs import (
    EARLIER,
    Group,
    Run,
    difference_text,
    groups_of,
    quality_text,
    read_runs,
)
from convergence_shown import shown_table
from frontier import draw_frontier, envelope_rows
from methods import METHODS
from readme import markdown
from tasks import Task

DOCS = Path(__file__).resolve().parents[2] / "docs"
BEGIN, END = "<!-- generated -->", "<!-- end -->"
HEAD = "# Convergence\n\n"
# fewer make no frontier
_DRAWN_FROM = 3
_SCHEDULES = {
    "cosine": "5 % of warm-up, then a cosine down to a twentieth",
    "onecycle": "torch's OneCycleLR, which cycles momentum too",
}
_ABOUT = """\
Made by `benchmarks/convergence.py` from `benchmarks/results/convergence.jsonl`. To run it again:

```
python benchmarks/convergence.py             # hours; goes on where it stopped
python benchmarks/convergence.py --report    # this page from the runs there are
```

- **Ranks are emulated.** One process trains with the hook's own compressor, residuals and momentum
  for each rank (`benchmarks/experiments/emulated_ranks.py`), held to the bits of
  DistributedDataParallel by `tests/benchmarks/test_convergence.py`. PowerSGD and the fp16 hook are
  written after torch's; PowerSGD compresses from the first step, and each matrix that gets smaller.
- **Rates are dense's own**, none was tuned for any method, unless a row names another. "top-Q" is
  the hook's defaults, q = {q:g}, {value_format} values and momentum="{momentum}", but for what its
  row names.
- SGD has momentum 0.9, AdamW betas 0.9 and 0.999. "No momentum" is momentum or beta1 0 from the
  start, with SGD's rate ten times as high.
- "local" is `LocalTopQ` after H inner steps, by its own stages
  (`benchmarks/experiments/local_ranks.py`, held to its bits on real ranks): the hook's q, format
  and bound, a residual that does not decay; AdamW's beta1 0 and outer rate {outer_lr:g}, or SGD
  with its momentum and outer rate {sgd_outer_lr:g}. These were chosen on the validation parts of
  gpt-moby and cifar10-sgd, one seed. "DiLoCo" sends everything and has an outer Nesterov momentum
  of 0.9 at rate 0.7; "SparseLoCo" sends one in 64 in two bits, keeps a residual that decays by
  0.95 and has outer rate 1. "DGC" sends whole values, with momentum correction and factor masking
  and without its warm-up. Their frames are ours. "ec1" beside "local" is q = {ec1_q:g} in that
  format, chosen on the validation part of gpt-moby, one seed.
- Quality is that of the test part, at the last step; nothing was chosen on it. The mean of three
  seeds is followed by the seeds themselves. Differences are to dense and of the seeds that both
  have: points of accuracy, per cent of loss in nats.
{earlier}- Curves are of 1,000 samples of the validation part, and means of the seeds.
- Times fewer: dense's fp32 bytes over those of one rank's frames, all steps counted.
"""
_EARLIER = f"""\
- A row with {EARLIER} has runs of an earlier version: without `keep_rate`, as the rows that say so
  are, and some of them without `adapt_rate`, which changes little where gradients are mostly noise.
"""
_FRONTIER = """\
## The frontier

![Test quality beside dense's over times fewer bytes, by family]({picture})

Each point of another family between 30 and 2,000 times fewer bytes, and the best of ours that is no
worse in no more bytes:
"""


def write_report(results: Path, docs: Path = DOCS) -> None:
    """Write `docs`/convergence.md and its pictures; what stands outside the markers stays."""
    groups = groups_of(read_runs(results))
    docs.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for group in _to_draw(groups):
        name = f"convergence_{group.task.name}.png"
        draw(group, docs / name)
        pictures[group.task.name] = name
    if draw_frontier(groups, docs / "frontier.png"):
        pictures["frontier"] = "frontier.png"
    page = docs / "convergence.md"
    before = page.read_text() if page.is_file() else HEAD
    head, _, rest = before.partition(BEGIN)
    tail = rest.partition(END)[2] or "\n"
    page.write_text(f"{head}{BEGIN}\n{_text(groups, pictures)}{END}{tail}")


def _to_draw(groups: Sequence[Group]) -> Iterator[Group]:
    """Yield the group of each task that compares most methods, of equal ones the longest."""
    for name in dict.fromkeys(group.task.name for group in groups):
        best = max(
            (group for group in groups if group.task.name == name),
            key=lambda group: (len(group.runs), group.steps, group.workers),
        )
        if len(best.runs) >= _DRAWN_FROM:
            yield best


def _text(groups: Sequence[Group], pictures: dict[str, str]) -> str:
    default = METHODS["top-Q"]
    is_any_earlier = any(group.is_earlier(method) for group in groups for method in group.runs)
    about = _ABOUT.format(
        q=default.q,
        value_format=default.value_format,
        momentum=default.momentum,
        earlier=_EARLIER * is_any_earlier,
        outer_lr=METHODS["local, H=5"].outer_lr,
        ec1_q=METHODS["local, H=4, ec1"].q,
        sgd_outer_lr=METHODS["local with momentum, H=5"].outer_lr,
    )
    parts = [about, _tasks_table(groups), "## What was to be shown\n", shown_table(groups)]
    if "frontier" in pictures:
        parts += [_FRONTIER.format(picture=pictures["frontier"]), _envelope(groups)]
    for name in dict.fromkeys(group.task.name for group in groups):
        parts.append(f"## {name}\n")
        if name in pictures:
            alternative = "Test quality over bytes, and validation quality over steps"
            parts.append(f"![{alternative}]({pictures[name]})\n")
        for group in groups:
            if group.task.name == name:
                title = f"### {group.steps:,} steps, {group.workers} ranks\n"
                parts += [title, group_table(group) if group.runs else _nothing(group)]
    return "\n".join(parts)


def _envelope(groups: Sequence[Group]) -> str:
    heads = ["task", "method", "test, to dense", "ours that is no worse in no more bytes"]
    return markdown(heads, envelope_rows(groups))


def _nothing(group: Group) -> str:
    return f"Not run: {'; '.join(group.expected)}.\n"


def _tasks_table(groups: Sequence[Group]) -> str:
    tasks = {group.task.name: group.task for group in groups}
    return markdown(
        ["task", "data", "optimizer", "peak rate", "weight decay", "samples a rank", "schedule"],
        [
            [
                task.name,
                task.data + (f", {task.context} characters" if task.context else ""),
                {"sgd": "SGD", "adamw": "AdamW"}[task.optimizer],
                f"{task.lr:g}",
                f"{task.weight_decay:g}",
                str(task.batch),
                _SCHEDULES[task.schedule],
            ]
            for task in tasks.values()
        ],
    )


def group_table(group: Group) -> str:
    """Return a row a method: bytes, quality, its seeds and the difference to dense."""
    quality = "test accuracy" if group.task.quality == "accuracy" else "test loss"
    heads = ["method", "sent a rank", "times fewer", quality, "seeds", "to dense"]
    lines = []
    for method in group.methods:
        runs = list(group.runs.get(method, {}).values())
        if not runs:
            lines.append([_title(method), "", "", "not run", "", ""])
            continue
        sent = [run.sent_bytes for run in runs if run.sent_bytes is not None]
        lines.append(
            [
                _title(method) + f" {EARLIER}" * group.is_earlier(method) + _failures(runs),
                human_bytes(statistics.fmean(sent)) if sent else "not kept",
                f"{group.mean(method, 'ratio'):.{0 if runs[0].ratio >= 10 else 1}f} x",
                quality_text(group.task, group.mean(method, "test")),
                _seeds(group.task, runs),
                "" if method == "dense" else _to_dense(group, method),
            ]
        )
    return markdown(heads, lines)


def _title(method: str) -> str:
    known = METHODS.get(method)
    return method if known is None or known.lr == 1.0 else f"{method}, rate x {known.lr:g}"


def _failures(runs: Sequence[Run]) -> str:
    failed = [run.seed for run in runs if run.failed]
    return f" (**failed**: {seeds_text(failed)})" if failed else ""


def _seeds(task: Task, runs: Sequence[Run]) -> str:
    listed = ", ".join(quality_text(task, run.test) for run in runs)
    count = {1: " (1 seed)", 3: ""}.get(len(runs), f" ({len(runs)} seeds)")
    return listed + count


def _to_dense(group: Group, method: str) -> str:
    text = difference_text(group.task, group.difference(method, "test"))
    seeds = group.common_seeds(method, "dense")
    partial = seeds and set(seeds) != set(group.runs[method]) | set(group.runs["dense"])
    return f"{text} ({seeds_text(seeds)})" if partial else text


def seeds_text(seeds: Sequence[int]) -> str:
    """Return seeds as text."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def human_bytes(count: float) -> str:
    """Return a number of bytes with a decimal unit, three digits of it."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"

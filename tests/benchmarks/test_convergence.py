"""The convergence report must train as the hook does, and tell what its runs came to."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import convergence
import pytest
import torch
from convergence_report import write_report
from convergence_runs import groups_of, read_runs
from datasets import Images, Text
from emulated_ranks import Kind, Method, PowerSgd, Ranks, make_scheduler
from methods import PLAN
from networks import Gpt, Mlp
from ranks import run_ranks
from tasks import Batches, OptimizerName, Task, loss_of
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from topq_dist import TopQState, register_topq_hook
from topq_dist.compress.layout import Layout
from topq_dist.hook.momentum import MomentumName

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "convergence.py"
WORLD_SIZE = 2
STEPS = 6
SEED = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training that is done twice: on real ranks, and on emulated ones."""

    model: str
    optimizer: OptimizerName
    momentum: MomentumName = "optimizer"
    value_format: str = "fp32"
    bound: float | None = None
    kind: Kind = "topq"

    def __str__(self) -> str:
        if self.kind != "topq":
            return f"{self.model}-{self.optimizer}-{self.kind}"
        bound = "" if self.bound is None else f"-bound{self.bound:g}"
        return f"{self.model}-{self.optimizer}-{self.momentum}-{self.value_format}{bound}"

    @property
    def task(self) -> Task:
        is_text = self.model == "gpt"
        return Task(
            name="small",
            data="none",
            model=_gpt if is_text else _mlp,
            batch=4,
            optimizer=self.optimizer,
            lr=0.05 if self.optimizer == "sgd" else 0.003,
            weight_decay=0.01,
            quality="loss" if is_text else "accuracy",
            context=8 if is_text else None,
        )

    @property
    def data(self) -> Images | Text:
        generator = torch.Generator().manual_seed(SEED)
        if self.model == "gpt":
            text = torch.randint(20, (200,), generator=generator)
            return Text(vocabulary=20, train=text, validation=text, test=text)
        pixels = torch.randint(256, (64, 1, 8, 8), generator=generator, dtype=torch.uint8)
        images = pixels, torch.randint(10, (64,), generator=generator)
        return Images(train=images, validation=images, test=images)


def _mlp(_: Images) -> nn.Module:
    return Mlp(features=64)


def _gpt(data: Text) -> nn.Module:
    return Gpt(vocabulary=data.vocabulary, layers=1, width=16, context=8)


def _cases() -> Iterator[Case]:
    for model in ("mlp", "gpt"):
        for value_format in ("fp32", "int2"):
            for optimizer in ("sgd", "adamw"):
                methods: list[MomentumName] = ["feedback", "corrected"]
                for momentum in methods + ["adam"] * (optimizer == "adamw"):
                    yield Case(
                        model=model,
                        optimizer=optimizer,
                        momentum=momentum,
                        value_format=value_format,
                    )
    yield Case(model="gpt", optimizer="adamw", momentum="feedback", value_format="fp16", bound=1.5)
    kinds: list[Kind] = ["dense", "fp16"]
    for kind in kinds:
        yield Case(model="mlp", optimizer="sgd", kind=kind)


CASES = list(_cases())


def _batches(case: Case) -> Batches:
    return Batches(case.task, case.data, seed=SEED, workers=WORLD_SIZE, steps=STEPS)


def _parameters(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def _on_real_ranks(rank: int) -> dict[str, tuple[Tensor, int | None]]:
    """Return parameters and sent bytes of each case."""
    return {str(case): _train_for_real(rank, case) for case in CASES}


def _train_for_real(rank: int, case: Case) -> tuple[Tensor, int | None]:
    task, batches = case.task, _batches(case)
    torch.manual_seed(SEED)
    # several buckets
    model = DistributedDataParallel(task.model(case.data), bucket_cap_mb=0.02)
    optimizer = task.make_optimizer(model, lr=task.lr, momentum=0.9)
    scheduler = make_scheduler(task, optimizer, STEPS)
    state = _register(model, optimizer, case)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, *batches.take(step, rank)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
    return _parameters(model), None if state is None else state.stats().sent_bytes


def _register(
    model: DistributedDataParallel, optimizer: torch.optim.Optimizer, case: Case
) -> TopQState | None:
    if case.kind == "fp16":
        model.register_comm_hook(None, fp16_compress_hook)
    if case.kind != "topq":
        return None
    return register_topq_hook(
        model,
        optimizer,
        q=0.97,
        momentum=case.momentum,
        value_format=case.value_format,
        bound=case.bound,
        exchange="allgather",
    )


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[Tensor, int | None]]]:
    return run_ranks(WORLD_SIZE, _on_real_ranks, tmp_path_factory.mktemp("ranks"))


@pytest.mark.gloo
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated_ranks_train_as_real_ones(
    case: Case, real: list[dict[str, tuple[Tensor, int | None]]]
) -> None:
    task, batches = case.task, _batches(case)
    torch.manual_seed(SEED)
    model = task.model(case.data)
    method = Method(
        name="",
        kind=case.kind,
        momentum=case.momentum,
        value_format=case.value_format,
        bound=case.bound,
    )
    group = Ranks(task, model, method, workers=WORLD_SIZE, steps=STEPS)
    before = _parameters(model)
    for step in range(STEPS):
        group.step([batches.take(step, rank) for rank in range(WORLD_SIZE)], step)
    ours = _parameters(model)
    assert not torch.equal(ours, before)
    for answer in real:
        parameters, sent_bytes = answer[str(case)]
        assert torch.equal(ours, parameters)
        # headers and padding are a bucket's, and of the emulated ranks' one frame
        assert sent_bytes is None or group.sent_bytes == pytest.approx(
            sent_bytes, rel=0.03, abs=350 * STEPS
        )


LAYOUT = Layout(names=("matrix", "bias", "kernel"), shapes=((6, 10), (7,), (4, 3, 3)))


def _gradients(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randn(LAYOUT.numel, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("rank", [4, 6, 20])
def test_powersgd_of_full_rank_is_dense(rank: int) -> None:
    flats = _gradients(3)
    mean, out = torch.stack(flats).mean(0), torch.empty(LAYOUT.numel)
    assert PowerSgd(LAYOUT, rank, 3).average(flats, out) == 4 * LAYOUT.numel
    torch.testing.assert_close(out, mean)


def test_powersgd_finds_what_has_its_rank() -> None:
    generator = torch.Generator().manual_seed(SEED)
    flat = torch.cat(
        [
            (torch.randn(a, 2, generator=generator) @ torch.randn(2, b, generator=generator)).view(
                -1
            )
            for a, b in ((6, 10), (7, 1), (4, 9))
        ]
    )
    out = torch.empty(LAYOUT.numel)
    sent = PowerSgd(LAYOUT, 2, 2).average([flat.clone(), flat.clone()], out)
    assert sent == 4 * (2 * (6 + 10) + 7 + 2 * (4 + 9))
    torch.testing.assert_close(out, flat, rtol=1e-4, atol=1e-4)


def test_powersgd_loses_nothing() -> None:
    """All averages and the mean of what is left add up to all gradients."""
    powersgd = PowerSgd(LAYOUT, 1, 2)
    given, arrived = torch.zeros(LAYOUT.numel), torch.zeros(LAYOUT.numel)
    gradients = _gradients(8)
    for first, second in zip(gradients[::2], gradients[1::2], strict=True):
        given += (first + second) / 2
        out = torch.empty(LAYOUT.numel)
        powersgd.average([first.clone(), second.clone()], out)
        arrived += out
    left = torch.stack(powersgd._errors).mean(0)
    assert left.abs().max() > 0.1
    torch.testing.assert_close(arrived + left, given)


def _quick(results: Path) -> list[str]:
    choice = ["--quick", "--only", "digits-sgd", "--seeds", "0", "--jobs", "1"]
    return [*choice, "--results", str(results)]


def test_quick_runs_are_not_done_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    results = tmp_path / "runs.jsonl"
    command = [sys.executable, str(SCRIPT), *_quick(results)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 runs to do" in done.stderr
    text = results.read_text()
    dense, topq = sorted(map(json.loads, text.splitlines()), key=lambda row: row["ratio"])
    assert (dense["method"], topq["method"]) == ("dense", "top-Q")
    assert dense["ratio"] == 1.0
    assert topq["ratio"] > 100.0
    assert all(10.0 < row["test"] <= 100.0 for row in (dense, topq))
    assert {row["steps"] for row in (dense, topq)} == {convergence.QUICK_STEPS}
    convergence.main(_quick(results))
    assert "0 of 2 runs to do" in capsys.readouterr().err
    assert results.read_text() == text


def test_runs_that_are_done_are_known(tmp_path: Path) -> None:
    results = tmp_path / "runs.jsonl"
    assert convergence.done_keys(results) == set()
    plan = [{"task": "digits-sgd", "steps": 9, "workers": 2, "methods": ["dense", "top-Q"]}]
    plan[0]["seeds"] = (0, 1)
    jobs = list(convergence.jobs_of(plan))
    assert [(job.seed, job.method) for job in jobs[:3]] == [
        (0, "dense"),
        (0, "top-Q"),
        (1, "dense"),
    ]
    _write(results, [_line(job.task, job.method, job.seed, 9, 1.0, workers=2) for job in jobs[:3]])
    assert [job for job in jobs if job.key not in convergence.done_keys(results)] == jobs[3:]


def _line(
    task: str,
    method: str,
    seed: int,
    steps: int,
    test: float,
    *,
    workers: int = 4,
    ratio: float = 1.0,
    **others: Any,
) -> dict[str, Any]:
    measured = {"validation": test, "train_loss": 1.0, "highest_loss": 4.0, "sent_bytes": 1_500_000}
    place = {"task": task, "method": method, "seed": seed, "workers": workers, "steps": steps}
    curve = [[steps // 2, test], [steps, test]]
    return place | measured | {"test": test, "ratio": ratio, "curve": curve, "wall_s": 1.0} | others


def _write(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _rows(page: str, first: str) -> list[list[str]]:
    """Return the cells of the rows that begin so."""
    lines = [line for line in page.splitlines() if line.startswith(f"| {first} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def _section(page: str, title: str) -> str:
    after = page.split(f"\n{title}\n", 1)[1]
    return after.split("\n#", 1)[0]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report on runs that are made up."""
    folder = tmp_path_factory.mktemp("report")
    lines = [
        *(_line("cifar10-sgd", "dense", seed, 1500, 57.0 + seed) for seed in range(3)),
        *(
            _line("cifar10-sgd", "top-Q", seed, 1500, 56.7 + seed, ratio=116.0, validation=50.0)
            for seed in range(3)
        ),
        _line("cifar10-sgd", "top-Q, q=0.9982", 1, 1500, 52.0, ratio=1200.0),
        _line("cifar10-sgd", "PowerSGD 1", 0, 1500, math.nan, ratio=40.0, highest_loss=math.inf),
        *(_line("gpt-moby", "dense", seed, 1000, 1.6) for seed in range(3)),
        *(_line("gpt-moby", "top-Q", seed, 1000, 1.6064, ratio=99.0) for seed in range(3)),
        *(_line("gpt-moby", "top-Q, q=0.99", seed, 1000, 1.64, ratio=300.0) for seed in (0, 2)),
        _line("gpt-moby", "PowerSGD 2", 0, 1000, 1.62, ratio=40.0),
        _line("gpt-moby", "PowerSGD 4", 0, 1000, 1.605, ratio=31.0),
        _line("gpt-moby", "PowerSGD 8", 0, 1000, 1.9, ratio=29.0),
        _line("gpt-moby", "SparseLoCo, H=5", 0, 1000, 1.65, ratio=301.0),
        _line("tied-onecycle", "dense", 0, 200, 2.5),
        _line("tied-onecycle", "top-Q, q=0.99", 0, 200, 7.0, ratio=300.0, highest_loss=9.0),
        _line("digits-sgd", "dense", 0, 7, 90.0, sent_bytes=None),
    ]
    _write(folder / "runs.jsonl", lines)
    (folder / "convergence.md").write_text(
        "# By hand\n\n<!-- generated -->\nold\n<!-- end -->\nend\n"
    )
    write_report(folder / "runs.jsonl", folder)
    # of three methods or more
    drawn = {path.stem: path.read_bytes()[:4] for path in folder.glob("*.png")}
    expected = ("convergence_cifar10-sgd", "convergence_gpt-moby", "frontier")
    assert drawn == dict.fromkeys(expected, b"\x89PNG")
    return (folder / "convergence.md").read_text()


def test_what_is_outside_the_markers_stays(page: str) -> None:
    assert page.startswith("# By hand\n\n<!-- generated -->\n")
    assert page.endswith("<!-- end -->\nend\n")
    assert "old" not in page.split()


def test_tables_have_means_seeds_and_differences(page: str) -> None:
    cifar = _section(page, "### 1,500 steps, 4 ranks")
    assert _rows(cifar, "dense") == [
        ["dense", "1.5 MB", "1.0 x", "58.00", "57.00, 58.00, 59.00", ""]
    ]
    assert _rows(cifar, "top-Q") == [
        ["top-Q", "1.5 MB", "116 x", "57.70", "56.70, 57.70, 58.70", "-0.30"]
    ]
    # to dense's run of that seed
    assert _rows(cifar, "top-Q, q=0.9982")[0][2:] == [
        "1200 x", "52.00", "52.00 (1 seed)", "-6.00 (seed 1)"
    ]  # fmt: skip
    assert (
        "| PowerSGD 1 (**failed**: seed 0) | 1.5 MB | 40 x | NaN | NaN (1 seed) | failed (seed 0) |"
        in cifar
    )
    assert _rows(cifar, "fp16 hook")[0][3] == "not run"
    assert _rows(_section(page, "### 1,000 steps, 4 ranks"), "top-Q")[0][3:] == [
        "1.6064", "1.6064, 1.6064, 1.6064", "+0.40 %"
    ]  # fmt: skip
    assert (
        "Not run: dense; top-Q; top-Q, q=0.9982; top-Q, q=0.9985; local with momentum, H=5;"
        in _section(page, "### 4,500 steps, 4 ranks")
    )
    # of no plan, and older than the count of bytes
    assert _rows(_section(page, "### 7 steps, 4 ranks"), "dense")[0][1] == "not kept"


def test_promises_are_met_missed_or_not_run(page: str) -> None:
    shown = _section(page, "## What was to be shown")
    cifar = [row[1:] for row in _rows(shown, "cifar10-sgd")]
    assert cifar == [
        ["4, 1,500", "top-Q", "116 x", "-0.30", "-8.00", "100 x, -0.5",
         "met on test, **missed** on validation"],
        ["4, 1,500", "top-Q, q=0.9982", "1200 x", "-6.00", "-6.00", "900 x, -3",
         "**missed** (1 seed)"],
        ["4, 4,500", "top-Q", "", "", "", "100 x, -0.5", "not run"],
        ["4, 4,500", "top-Q, q=0.9982", "", "", "", "900 x, -1", "not run"],
        ["4, 4,500", "local with momentum, H=5", "", "", "", "500 x, -2", "not run"],
        ["4, 1,500", "top-Q, q=0.99", "", "", "", "250 x, -1", "not run"],
        ["4, 1,500", "top-Q, q=0.9985", "", "", "", "1000 x, -2", "not run"],
        ["4, 4,500", "top-Q, q=0.9985", "", "", "", "1000 x, -0.5", "not run"],
    ]  # fmt: skip
    moby = {(row[1], row[2]): row[3:] for row in _rows(shown, "gpt-moby")}
    assert moby["4, 1,000", "top-Q"][-1] == "**missed**: too many bytes"
    assert moby["4, 1,000", "top-Q, q=0.99"] == [
        "300 x", "+2.50 %", "+2.50 %", "280 x, +3 %", "met (2 seeds)"
    ]  # fmt: skip
    tied = {row[2]: row[4:] for row in _rows(shown, "tied-onecycle")}
    assert tied["top-Q, q=0.99"] == ["+180.00 %", "+180.00 %", "+200 %", "met (1 seed)"]
    assert tied["top-Q, q=0.99: highest loss of a step"][-1] == "**missed** (1 seed)"
    formats = [row for row in _rows(shown, "gpt-moby") if "every" in row[2]]
    assert formats[0][-1] == "not run: fp32, fp16, bf16, int8, int4"


def test_the_frontier_names_what_is_no_worse_in_no_more_bytes(page: str) -> None:
    # seed 0 of the loss 1.6 is what each is compared with; below 30 times fewer nothing is asked
    assert _rows(_section(page, "## The frontier"), "gpt-moby") == [
        ["gpt-moby", "PowerSGD 4", "+0.31 % at 31 x (1 seed)", "**none**"],
        ["gpt-moby", "PowerSGD 2", "+1.25 % at 40 x (1 seed)", "top-Q: +0.40 % at 99 x"],
        ["gpt-moby", "SparseLoCo, H=5", "+3.12 % at 301 x (1 seed)", "**none**"],
    ]


def test_a_report_without_runs_says_so(tmp_path: Path) -> None:
    write_report(tmp_path / "none.jsonl", tmp_path)
    text = (tmp_path / "convergence.md").read_text()
    assert text.startswith("# Convergence\n\n<!-- generated -->\n")
    assert text.count("Not run: ") == len(
        {(row["task"], row["workers"], row["steps"]) for row in PLAN}
    )
    write_report(tmp_path / "none.jsonl", tmp_path)
    assert (tmp_path / "convergence.md").read_text() == text


def test_of_a_run_done_twice_the_last_counts(tmp_path: Path) -> None:
    lines = [_line("digits-sgd", "dense", 0, 500, quality) for quality in (80.0, 90.0)]
    _write(tmp_path / "runs.jsonl", lines)
    runs = read_runs(tmp_path / "runs.jsonl")
    assert [run.test for run in runs] == [90.0]
    assert [group.mean("dense", "test") for group in groups_of(runs) if group.runs] == [90.0]


def test_runs_of_an_earlier_version_are_marked_and_done_again(tmp_path: Path) -> None:
    results = tmp_path / "runs.jsonl"
    lines = [
        _line("digits-sgd", "dense", 0, 500, 90.0),
        _line("digits-sgd", "top-Q", 0, 500, 91.0, earlier=True),
    ]
    _write(results, lines)
    assert convergence.done_keys(results) == {("digits-sgd", "dense", 0, 4, 500)}
    write_report(results, tmp_path)
    page = (tmp_path / "convergence.md").read_text()
    assert "| top-Q \u2020 |" in page
    assert "| dense |" in page

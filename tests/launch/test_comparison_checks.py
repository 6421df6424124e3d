"""Checks that compare.py makes before any process starts."""

import shlex
import shutil
import socket
from pathlib import Path

import pytest
from training import checkpoint, comparison, ps_run
from training.checkpoint import checkpoint_folder, run_config, server_folder
from training.comparison import check, check_workers
from training.data import load_data
from training.ddp_run import OWN_KEYS, SHARED_KEYS
from training.models import build_model
from training.options import parse_comparison
from training.settings import Comparison, Mode


@pytest.fixture(autouse=True)
def _no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "run_ranks", None)


def options(tmp_path: Path, line: str = "") -> Comparison:
    folders = f" --out {tmp_path / 'out'} --checkpoint {tmp_path / 'ck'}"
    return parse_comparison(shlex.split(line + folders))


def write_checkpoint(compared: Comparison, mode: Mode, step: int = 5) -> None:
    training = compared.training
    assert training.checkpoint is not None
    model = build_model(load_data(training.data, training.data_dir))
    folder = checkpoint_folder(training.checkpoint, mode)
    checkpoint.save(
        folder,
        step,
        config=run_config(training, mode, compared.ranks, model),
        shared=dict.fromkeys(SHARED_KEYS),
        own=dict.fromkeys(OWN_KEYS),
    )
    (saved,) = folder.glob(f"step-*{step}")
    for rank in range(1, compared.ranks):
        shutil.copy(saved / "rank-0.pt", saved / f"rank-{rank}.pt")


def write_workers(compared: Comparison, steps: list[int | None], own: set[str]) -> None:
    """Write what workers of a server leave behind, whose newest checkpoints are of these steps."""
    training = compared.training
    assert training.checkpoint is not None
    config = run_config(training, "ps", compared.ranks, build_model(load_data("digits", None)))
    server_folder(training.checkpoint).mkdir(parents=True)
    for rank, step in enumerate(steps):
        if step is not None:
            folder = checkpoint_folder(training.checkpoint, "ps", f"worker-{rank}")
            shared = dict.fromkeys(ps_run.SHARED_KEYS)
            checkpoint.save(folder, step, config=config, shared=shared, own=dict.fromkeys(own))


def refusal(compared: Comparison, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_info:
        check(compared)
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_says_what_will_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainings = check(options(tmp_path, "--steps 7"))
    assert list(trainings) == ["dense", "topq"]
    said = capsys.readouterr().out
    for part in ("digits", "898", "899", "2 ranks", "sgd", "7 steps", "q 0.97"):
        assert part in said


def test_missing_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(options(tmp_path, f"--data fashion-mnist --data-dir {tmp_path}"), capsys)
    assert "dataset-fashion-mnist" in message
    assert not (tmp_path / "out").exists()


def test_more_samples_a_step_than_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(options(tmp_path, "--ranks 3 --batch-size 300"), capsys)
    for part in ("--batch-size 300", "--ranks 3", "898"):
        assert part in message


@pytest.mark.parametrize("option", ["out", "ck"])
def test_a_folder_that_cannot_be_made(
    tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / option).write_text("a file")
    assert str(tmp_path / option) in refusal(options(tmp_path), capsys)


def test_resume_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(options(tmp_path, "--resume"), capsys)
    assert f"--checkpoint {tmp_path / 'ck'}" in message
    assert "found none" in message


@pytest.mark.usefixtures("lone_rank")
def test_resumes_what_there_is(tmp_path: Path) -> None:
    write_checkpoint(options(tmp_path), "dense")
    trainings = check(options(tmp_path, "--resume"))
    assert trainings["dense"].resume
    assert not trainings["topq"].resume


@pytest.mark.usefixtures("lone_rank")
def test_a_checkpoint_without_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(options(tmp_path), "topq")
    message = refusal(options(tmp_path), capsys)
    assert "step-00000005 is there already" in message
    assert "--resume" in message


@pytest.mark.usefixtures("lone_rank")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--ranks 3", "ranks 2, here 3"),
        ("--q 0.5", "q 0.97, here 0.5"),
        ("--inner-opt adam --lr 0.1", "inner optimizer sgd, here adam"),
        ("--seed 1", "seed 0, here 1"),
        ("--lr-schedule linear", "learning rate schedule unknown, here linear"),
        ("--batch-size 16", "batch size 32, here 16"),
        ("--steps 4", "past --steps 4: expected at least 5"),
    ],
)
def test_a_checkpoint_of_another_run(
    tmp_path: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(options(tmp_path), "topq")
    assert message in refusal(options(tmp_path, f"{line} --resume"), capsys)


@pytest.mark.usefixtures("lone_rank")
def test_a_checkpoint_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(options(tmp_path), "topq")
    text = tmp_path / "a_gut.txt"
    text.write_text("to be or not to be\n" * 1000)
    message = refusal(
        options(tmp_path, f"--resume --data shakespeare --data-dir {tmp_path}"), capsys
    )
    assert "data digits, here shakespeare" in message
    assert "model characters.weight absent, here [" in message


@pytest.mark.usefixtures("lone_rank")
def test_a_rank_whose_file_is_broken_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison = options(tmp_path, "--resume")
    write_checkpoint(comparison, "dense")
    (broken,) = (tmp_path / "ck" / "dense").glob("step-*/rank-1.pt")
    broken.write_bytes(broken.read_bytes()[:40])
    assert "rank-1.pt" in refusal(comparison, capsys)


@pytest.mark.parametrize(("steps", "resumed"), [([5, 10], True), ([0, None], False)])
def test_workers_resume_once_all_could_have_pushed(
    tmp_path: Path, steps: list[int | None], resumed: bool
) -> None:
    comparison = options(tmp_path, "--mode ps --topq-only --resume --steps 20")
    write_workers(comparison, steps, set(ps_run.OWN_KEYS))
    model = build_model(load_data("digits", None))
    assert check_workers(comparison, model).resume is resumed


@pytest.mark.parametrize(
    ("line", "steps", "message"),
    [
        ("", [5, 5], "worker-0/step-00000005 is there already"),
        ("", [None, None], "ps/server is there without a checkpoint of any worker"),
        ("--resume", [5, None], "expected a checkpoint in"),
        ("--resume --seed 1", [5, 5], "seed 0, here 1"),
        ("--resume --steps 4", [5, 5], "past --steps 4"),
    ],
)
def test_checkpoints_of_workers_that_do_not_fit(
    tmp_path: Path,
    line: str,
    steps: list[int | None],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_workers(options(tmp_path, "--mode ps"), steps, set(ps_run.OWN_KEYS))
    assert message in refusal(options(tmp_path, f"--mode ps --topq-only {line}"), capsys)


def test_a_workers_checkpoint_without_its_optimizer_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_workers(options(tmp_path, "--mode ps"), [5, 5], {"generator"})
    message = refusal(options(tmp_path, "--mode ps --topq-only --resume"), capsys)
    assert "rank-0.pt lacks optimizer" in message


def test_a_server_that_does_not_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        comparison = options(tmp_path, f"--mode ps --server 127.0.0.1:{port}")
        assert f"--server 127.0.0.1:{port}" in refusal(comparison, capsys)

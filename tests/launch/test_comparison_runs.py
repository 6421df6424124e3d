"""The main job end to end: real torchrun, real ranks, real kills."""

import os
import signal
import time
from pathlib import Path

import pytest
from train_jobs import finish, processes_with, ranks_below, results, start, wait_for
from training import checkpoint

pytestmark = pytest.mark.gloo

STEPS = 160
# a mode's result, but for what a clock said
EXACT = ("parameters_sha256", "losses", "dense_bytes", "test_loss", "test_accuracy")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    code, said, complaints = finish(start("--steps", STEPS, "--out", out))
    assert (code, complaints) == (0, "")
    (out / "said.txt").write_text(said)
    return out


def test_says_what_a_user_came_for(undisturbed: Path) -> None:
    said = (undisturbed / "said.txt").read_text()
    for part in ("dense DDP", "top-Q", "test accuracy", "sent a rank", "x", "digits.png"):
        assert part in said
    # a terminal's 80 columns, but for the last line, which ends with a path
    assert max(map(len, said.splitlines()[:-1])) <= 80


def test_the_two_modes_differ_only_in_what_they_send(undisturbed: Path) -> None:
    result = results(undisturbed)
    dense, topq = result["dense"], result["topq"]
    # the same seed: the same parameters and batch before the first step
    assert dense["losses"][0] == topq["losses"][0]
    assert dense["parameters_sha256"] != topq["parameters_sha256"]
    for mode in (dense, topq):
        assert len(mode["losses"]) == len(mode["sent_bytes"]) == STEPS
        assert mode["losses"][-1] < mode["losses"][0] / 2
        assert mode["sent_bytes"] == sorted(mode["sent_bytes"])
    # all of an fp32 gradient each step, as plain DDP hands it over
    assert dense["sent_bytes"][-1] == dense["parameters"] * 4 * STEPS
    assert topq["dense_bytes"] == dense["dense_bytes"] == dense["sent_bytes"][-1]
    assert topq["sent_bytes"][-1] * 30 < topq["dense_bytes"]


def test_draws_the_picture(undisturbed: Path) -> None:
    assert (undisturbed / "digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("mode", ["dense", "topq"])
def test_killed_and_resumed_is_undisturbed_to_the_bit(
    undisturbed: Path, tmp_path: Path, mode: str
) -> None:
    arguments = ["--steps", STEPS, f"--{mode}-only", "--out", tmp_path / "out"]
    arguments += ["--checkpoint", tmp_path / "ck", "--checkpoint-every", 40]
    process = start(*arguments)
    wait_for(tmp_path / "ck" / mode / "step-00000040", process)
    victim = ranks_below(process)[1]
    os.kill(victim, signal.SIGKILL)
    code, _, complaints = finish(process)
    assert code == 1
    assert f"rank 1 (process {victim}) was killed by SIGKILL" in complaints
    assert "--resume" in complaints
    assert "Traceback" not in complaints
    assert not (tmp_path / "out" / f"digits-{mode}.json").exists()

    code, _, complaints = finish(start(*arguments, "--resume"))
    assert (code, complaints) == (0, "")
    resumed, expected = results(tmp_path / "out")[mode], results(undisturbed)[mode]
    for key in EXACT:
        assert resumed[key] == expected[key], key
    # how much a frame is padded depends on the frames before it, which a new process has not seen
    assert resumed["sent_bytes"][-1] == pytest.approx(expected["sent_bytes"][-1], rel=0.01)
    newest = checkpoint.latest(tmp_path / "ck" / mode)
    assert newest is not None
    assert checkpoint.step_of(newest) == STEPS


@pytest.mark.parametrize(
    ("number", "to_group", "code"),
    [(signal.SIGINT, True, 130), (signal.SIGINT, False, 130), (signal.SIGTERM, False, 143)],
    ids=["Ctrl-C", "SIGINT", "SIGTERM"],
)
def test_a_signal_ends_all_ranks_in_one_line(
    tmp_path: Path, number: signal.Signals, to_group: bool, code: int
) -> None:
    arguments = ["--steps", 100_000, "--topq-only", "--out", tmp_path / "out"]
    arguments += ["--checkpoint", tmp_path / "ck", "--checkpoint-every", 2]
    process = start(*arguments)
    wait_for(tmp_path / "ck" / "topq" / "step-00000004", process)
    # compare.py is a fork, without words of its own
    assert len(processes_with(str(tmp_path))) == 2
    sent_s = time.monotonic()
    if to_group:
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid, number)
    ended, _, complaints = finish(process)
    assert time.monotonic() - sent_s < 10
    assert ended == code
    assert processes_with(str(tmp_path)) == []
    assert "Traceback" not in complaints
    assert len(complaints.strip().splitlines()) == 1
    assert f"stopped by {number.name}" in complaints
    newest = checkpoint.latest(tmp_path / "ck" / "topq")
    assert newest is not None
    assert str(newest) in complaints
    for rank in range(2):
        shared, own = checkpoint.load(newest, rank)
        assert len(shared["losses"]) == checkpoint.step_of(newest)
        assert own["topq"]

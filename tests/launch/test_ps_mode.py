"""train.sh --mode ps end to end: a real server, real workers, real kills."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from forked_process import ForkedProcess, Place, run_script
from server_process import ServerProcess
from train_jobs import finish, processes_with, results, start, wait_for
from training import checkpoint
from training.errors import ServerUnfitError
from training.options import parse_worker
from training.ps_run import client_security

pytestmark = pytest.mark.gloo

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
STEPS = 60
EVERY = 20
# workers that drive the learning rate have more to remember
SCHEDULE = ("--lr-schedule", "linear")
# a run's result, but for what a clock said, and for what was sent twice
EXACT = ("parameters_sha256", "losses", "test_loss", "test_accuracy")


def mode_ps(out: Path, *arguments: object) -> list[object]:
    """Return arguments of compare.py for the server alone."""
    return ["--mode", "ps", "--topq-only", *SCHEDULE, "--steps", STEPS, "--out", out, *arguments]


def checkpoints(folder: Path) -> list[object]:
    return ["--checkpoint", folder, "--checkpoint-every", EVERY]


def worker_folder(folder: Path, rank: int) -> Path:
    return folder / "ps" / "workers" / f"worker-{rank}"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    code, said, complaints = finish(
        start("--mode", "ps", *SCHEDULE, "--steps", STEPS, "--out", out)
    )
    assert (code, complaints) == (0, "")
    (out / "said.txt").write_text(said)
    return out


def test_says_what_a_user_came_for(undisturbed: Path) -> None:
    said = (undisturbed / "said.txt").read_text()
    for part in ("dense DDP", "top-Q PS", "accuracy", "sent", "received", "digits-ps.png"):
        assert part in said
    sums = re.findall(r"^parameters sha256: ([0-9a-f]{64})$", said, re.MULTILINE)
    assert sums == [results(undisturbed)["ps"]["parameters_sha256"]]
    table = said.partition("parameters sha256")[0]
    assert max(map(len, table.splitlines())) <= 80
    assert (undisturbed / "digits-ps.png").read_bytes().startswith(b"\x89PNG")


def test_the_server_saves_bytes_both_ways(undisturbed: Path) -> None:
    found = results(undisturbed)
    dense, ps = found["dense"], found["ps"]
    # the same seed: the same parameters and batch before the first step
    assert ps["losses"][0] == dense["losses"][0]
    assert ps["losses"][-1] < 0.8 * ps["losses"][0]
    assert dense["received_bytes"] == dense["sent_bytes"]
    assert ps["dense_bytes"] == dense["dense_bytes"] == dense["parameters"] * 4 * STEPS
    for counts in (ps["sent_bytes"], ps["received_bytes"]):
        assert len(counts) == STEPS
        assert counts == sorted(counts)
    assert ps["sent_bytes"][-1] * 40 < ps["dense_bytes"]
    # the model, which a worker fetches at its start, is no part of a step
    fetched = dense["parameters"] * 4
    assert (ps["received_bytes"][-1] - fetched) * 20 < ps["dense_bytes"]


# three runs one after the other, of four processes each
@pytest.mark.timeout(400)
def test_killed_and_resumed_is_undisturbed_to_the_bit(undisturbed: Path, tmp_path: Path) -> None:
    arguments = mode_ps(tmp_path / "out", *checkpoints(tmp_path / "ck"))
    resume: list[str] = []
    for script, reached in (("ps_worker.py", EVERY), ("topq_dist.cli", 2 * EVERY)):
        process = start(*arguments, *resume)
        wait_for(worker_folder(tmp_path / "ck", 1) / f"step-{reached:08d}", process)
        victim = max(set(processes_with(script)) & set(processes_with(str(tmp_path / "ck"))))
        os.kill(victim, signal.SIGKILL)
        code, _, complaints = finish(process)
        assert code == 1
        assert f"(process {victim}) was killed by SIGKILL" in complaints
        assert "go on with --resume from" in complaints
        assert "Traceback" not in complaints
        assert processes_with(str(tmp_path)) == []
        resume = ["--resume"]

    code, said, complaints = finish(start(*arguments, *resume))
    assert (code, complaints) == (0, "")
    resumed, expected = results(tmp_path / "out")["ps"], results(undisturbed)["ps"]
    for key in EXACT:
        assert resumed[key] == expected[key], key
    assert f"parameters sha256: {expected['parameters_sha256']}" in said
    for rank in range(2):
        newest = checkpoint.latest(worker_folder(tmp_path / "ck", rank))
        assert newest is not None
        assert checkpoint.step_of(newest) == STEPS


@pytest.mark.parametrize(
    ("number", "to_group", "code"),
    [(signal.SIGINT, True, 130), (signal.SIGKILL, False, -9)],
    ids=["Ctrl-C", "SIGKILL"],
)
def test_a_signal_ends_server_and_workers(
    tmp_path: Path, number: signal.Signals, to_group: bool, code: int
) -> None:
    arguments = mode_ps(tmp_path / "out", *checkpoints(tmp_path / "ck"), "--steps", 100_000)
    process = start(*arguments)
    wait_for(worker_folder(tmp_path / "ck", 1) / f"step-{EVERY:08d}", process)
    # the server, the workers; compare.py is a fork, without words of its own
    assert len(processes_with(str(tmp_path))) == 3
    if to_group:
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid, number)
    ended, _, complaints = finish(process)
    assert ended == code
    if number == signal.SIGKILL:
        # nobody is left to wait for the server's drain
        end_s = time.monotonic() + 20
        while processes_with(str(tmp_path)) and time.monotonic() < end_s:
            time.sleep(0.1)
    else:
        assert len(complaints.strip().splitlines()) == 1
        assert f"stopped by {number.name}" in complaints
    assert processes_with(str(tmp_path)) == []
    assert "Traceback" not in complaints


def test_uses_a_running_server_by_workers_alone(undisturbed: Path, tmp_path: Path) -> None:
    """As containers do: no torchrun, each worker told by its environment who it is."""
    training = {"inner_opt": "sgd", "options": {"lr": 0.1}, "downlink": "topq"}
    two = {"start_workers": 2, "max_workers": 2}
    with ServerProcess(tmp_path / "state", training, two) as server:
        code, _, complaints = finish(
            start(*mode_ps(tmp_path), "--server", server.address, "--inner-opt", "adam")
        )
        assert code == 2
        assert complaints == (
            f"train.sh: --inner-opt adam: the server at {server.address} trains with sgd: "
            "expected the same\n"
        )
        workers = [worker(rank, server.address) for rank in range(2)]
        try:
            for rank, process in enumerate(workers):
                code, said, complaints = finish(process)
                assert (code, complaints) == (0, "")
                assert f"worker-{rank}: test accuracy" in said
                expected = results(undisturbed)["ps"]["parameters_sha256"]
                assert f"parameters sha256: {expected}\n" in said
        finally:
            for process in workers:
                process.kill()
        assert server.terminate() == (0, "")


def worker(rank: int, address: str) -> ForkedProcess:
    """Start one worker alone."""
    host, _, port = address.rpartition(":")
    # as the name of several servers
    named = f"{host}:[{port}-{port}]"
    told = {"TOPQ_SERVER": named, "RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    words = "--steps", str(STEPS), *SCHEDULE
    place = Place(variables={**os.environ, **told})
    return ForkedProcess(run_script, LAUNCH / "ps_worker.py", *words, place=place)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--server", "nonsense"], "--server='nonsense': expected HOST:PORT"),
        (["--server", "a:[2-1]"], "--server='a:[2-1]': expected a range"),
        (["--server", "a:1", "--tls-ca", "absent"], "--tls-ca='absent': No such file"),
        (["--server", "a:1", "--tls-ca", __file__], f"--tls-ca='{__file__}': expected certifi"),
        (["--server", "a:1", "--token-file", "absent"], "--token-file='absent': No such file"),
        (["--server", "a:1", "--worker", "b c"], "--worker='b c': expected 1 to 64 letters"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], complaint: str) -> None:
    told = parse_worker([*arguments, "--rank", "0", "--ranks", "1"])
    with pytest.raises(ServerUnfitError, match=f"^{re.escape(complaint)}"):
        client_security(told.connection, told.name)

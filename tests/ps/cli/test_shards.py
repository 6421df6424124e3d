"""Several servers from one command: one name, one end, and each shard's own state."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from ps.workers import backward, batch, make_model, side_by_side, values
from served import Served
from server_process import quiet_port

from topq_dist.cli import main
from topq_dist.ps import ParameterServerOptimizer
from topq_dist.ps.cli.shards import Server, _remove_unused, split
from topq_dist.ps.protocol.config import ServingConfig, TrainingConfig
from topq_dist.ps.security.many_addresses import in_many, in_one_name, next_addresses
from topq_dist.ps.security.policy import ServerSecurity
from topq_dist.ps.state.directory_lock import DirectoryLock

SGD = ("--inner-opt", "sgd", "--lr", "0.1")


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("a:1", ["a:1"]),
        ("a:[9-11]", ["a:9", "a:10", "a:11"]),
        ("s-[08-10].s:1", ["s-08.s:1", "s-09.s:1", "s-10.s:1"]),
        ("[::1]:[1-2]", ["[::1]:1", "[::1]:2"]),
        ("a:1, b:[2-3]", ["a:1", "b:2", "b:3"]),
        ("unix:/a,b", ["unix:/a,b"]),
    ],
)
def test_one_text_names_several(text: str, addresses: list[str]) -> None:
    assert in_many(text) == addresses
    assert in_many(in_one_name(addresses)) == addresses


def test_ports_follow_on_each_other_and_one_name_says_so() -> None:
    assert in_one_name(next_addresses("[::1]:7", 3)) == "[::1]:[7-9]"
    assert next_addresses("a:0", 2) == ["a:0", "a:0"]
    assert in_one_name(["a:7", "a:9"]) == "a:7,a:9"


@pytest.mark.parametrize("text", ["a:[3-2]", "a:[0-99999]"])
def test_a_range_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="expected a range"):
        in_many(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--address", "unix:/tmp/x", "--shards", "2"], "expected HOST:PORT for 2 servers"),
        (["--address", "127.0.0.1:65535", "--shards", "2"], "expected 2 ports from there"),
        (["--shards", "3"], "has the state of 2 shards, not of 3"),
        ([], "has the state of 2 shards, not of 1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for shard in range(2 if "state" in message else 0):
        (tmp_path / f"shard-{shard}").mkdir()
    assert main(["serve", "--state-dir", str(tmp_path), *SGD, *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["--address", "0.0.0.0:7"], ["--metrics", "nowhere:at:all"], ["--lr", "1e9"]],
    ids=["insecure", "view", "rate"],
)
def test_a_refused_start_leaves_no_folder_behind(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--state-dir", str(tmp_path), *SGD, "--shards", "2", *words]) == 2
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err.startswith("topq serve: error: --")


def busy_start(state_dir: Path) -> int:
    """Return the exit code of a start of two shards, the second of which has no port."""
    port = quiet_ports()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port + 1))
        taken.listen()
        address = f"127.0.0.1:{port}"
        words = ["--address", address, "--state-dir", str(state_dir), *SGD, "--shards", "2"]
        return main(["serve", *words])


@pytest.mark.timeout(200)
def test_a_start_that_fails_in_a_shard_leaves_nothing_that_it_has_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert busy_start(tmp_path / "made" / "here") == 1
    assert "shard 1: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(200)
def test_a_start_that_fails_in_a_shard_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "shard-0").mkdir()
    (tmp_path / "shard-1").mkdir()
    (tmp_path / "shard-0" / "snapshot.safetensors").write_text("damaged")
    assert busy_start(tmp_path) == 1
    assert (tmp_path / "shard-0" / "snapshot.safetensors").read_text() == "damaged"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-0", "shard-1"]


def test_folders_go_only_where_no_shard_has_state_and_nobody_has_them(tmp_path: Path) -> None:
    folders = [tmp_path / "shard-0", tmp_path / "shard-1"]
    for folder in folders:
        folder.mkdir()
    with closing(DirectoryLock(folders[1])):
        _remove_unused(folders, folders)
        assert all(folder.exists() for folder in folders)
    (folders[1] / "snapshot.safetensors").touch()
    _remove_unused(folders, folders)
    assert all(folder.exists() for folder in folders)
    (folders[1] / "snapshot.safetensors").unlink()
    _remove_unused(folders, folders)
    assert list(tmp_path.iterdir()) == []


def test_only_the_folder_of_a_shard_is_taken_for_one(tmp_path: Path) -> None:
    for name in ("shard-0", "shard-1", "shard-1.old", "shard-notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "shard-2").touch()
    server = Server(
        training=TrainingConfig(inner_opt="sgd"),
        serving=ServingConfig(),
        security=ServerSecurity(),
        address="127.0.0.1:0",
        state_dir=tmp_path,
        log_level="warning",
        log_format="text",
    )
    assert [one.state_dir.name for one in split(server, 2)] == ["shard-0", "shard-1"]
    with pytest.raises(ValueError, match="has the state of 2 shards, not of 3"):
        split(server, 3)


def test_folders_that_cannot_be_made_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    words = ["--state-dir", str(tmp_path / "file" / "run"), *SGD, "--shards", "2"]
    assert main(["serve", *words]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"topq: error: state directory {tmp_path}/file/run")
    assert errors.count("\n") == 1


def test_a_model_without_shards_is_not_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "snapshot.safetensors").touch()
    assert main(["serve", "--state-dir", str(tmp_path), *SGD, "--shards", "2"]) == 2
    assert "has the state of 1 shards, not of 2" in capsys.readouterr().err


def served(state_dir: Path, port: int) -> Served:
    words = ["--address", f"127.0.0.1:{port}", "--state-dir", str(state_dir), *SGD]
    words += ["--workers", "2", "--shards", "2", "--metrics", "0"]
    return Served(*words, OMP_NUM_THREADS="1")


def quiet_ports() -> int:
    """Return a port that is free, as the next one is."""
    while True:
        port = quiet_port()
        with socket.socket() as end:
            if end.connect_ex(("127.0.0.1", port + 1)) != 0:
                return port


@pytest.mark.timeout(400)
def test_two_shards_train_as_one_and_end_as_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    port = quiet_ports()
    servers = served(tmp_path, port)
    address = servers.address
    assert address == f"127.0.0.1:[{port}-{port + 1}]"
    models = [make_model() for _ in range(2)]

    def join(n: int) -> ParameterServerOptimizer:
        return ParameterServerOptimizer(models[n].named_parameters(), address, worker=f"w{n}")

    def step(n: int) -> None:
        backward(models[n], [batch(n, 0)])
        workers[n].step()

    try:
        workers = side_by_side(2, join)
        assert main(["health", "--address", address]) == 0
        side_by_side(2, step)
        # one is killed: the other ends in good order, and the command says why it does
        children = children_of(servers.pid)
        os.kill(children[1], signal.SIGKILL)
        wait_for_end(children)
        code, _, errors = servers.stop(0)
        assert code == 1
        assert "topq: error: shard 1 was killed by SIGKILL, and the others were ended" in errors
        servers = served(tmp_path, port)
        side_by_side(2, step)
        # the command is killed: they hear of it by themselves, since nobody is left to tell them
        children = children_of(servers.pid)
        servers.kill()
        wait_for_end(children)
        assert main(["status", "--address", address]) == 1
        assert capsys.readouterr().err.count("no answer from") == 2
        servers = served(tmp_path, port)
        side_by_side(2, step)
        views = [servers.line() for _ in range(2)]
        assert all(line.startswith("metrics at http://127.0.0.1:") for line in views)
        assert main(["status", "--json", "--address", address]) == 0
        told = json.loads(capsys.readouterr().out)
        assert [one["version"] for one in told] == [3, 3]
        assert sum(one["numel"] for one in told) == sum(p.numel() for p in models[0].parameters())
        side_by_side(2, lambda n: workers[n].close())
        code, said, errors = servers.stop()
        assert (code, said) == (0, "")
        assert "Traceback" not in errors
    finally:
        servers.kill()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-0", "shard-1"]
    assert torch.equal(values(models[0]), values(models[1]))


def children_of(pid: int) -> list[int]:
    """Return the shards of a server; the tracker of multiprocessing is none."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(one) for one in found if "spawn_main" in Path(f"/proc/{one}/cmdline").read_text()]


def wait_for_end(pids: list[int]) -> None:
    assert len(pids) == 2
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, pids
        time.sleep(0.05)

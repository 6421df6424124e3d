"""Checkpoints on disk: whole or not there, kept two at a time, refused when of another run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training import checkpoint
from training.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("lone_rank")

CONFIG = {"data": "digits", "ranks": 1, "q": 0.99, "model": {"weight": [2, 3], "bias": [2]}}


def save(folder: Path, step: int) -> None:
    checkpoint.save(
        folder,
        step,
        config=CONFIG,
        shared={"weight": torch.full((1000,), float(step)), "losses": [0.5, float(step)]},
        own={"residual": torch.full((10,), -float(step))},
    )


def assert_whole(path: Path | None, *steps: int) -> None:
    assert path is not None
    step = checkpoint.step_of(path)
    assert step in steps
    checkpoint.check(path, CONFIG)
    shared, own = checkpoint.load(path, 0)
    assert torch.equal(shared["weight"], torch.full((1000,), float(step)))
    assert shared["losses"] == [0.5, float(step)]
    assert torch.equal(own["residual"], torch.full((10,), -float(step)))


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "topq"
    assert checkpoint.latest(folder) is None
    for step in (5, 10, 99, 100):
        save(folder, step)
        assert_whole(checkpoint.latest(folder), step)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000099", "step-00000100"]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    save(tmp_path, 99_999_999)
    save(tmp_path, 100_000_000)
    assert_whole(checkpoint.latest(tmp_path), 100_000_000)


def test_a_torn_one_is_neither_read_nor_left(tmp_path: Path) -> None:
    save(tmp_path, 5)
    torn = tmp_path / "step-00000010.tmp"
    torn.mkdir()
    (torn / "shared.pt").write_bytes(b"half")
    assert_whole(checkpoint.latest(tmp_path), 5)
    save(tmp_path, 10)
    assert_whole(checkpoint.latest(tmp_path), 10)
    assert not torn.exists()


class Killed(BaseException):
    pass


@pytest.fixture
def syscalls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes what touches the disk raise Killed once the counter in this list comes to 0."""
    left = [-1]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return function(*arguments, **keywords)

        return call

    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(torch, "save", counted(torch.save))
    monkeypatch.setattr(Path, "open", counted(Path.open))
    monkeypatch.setattr(Path, "mkdir", counted(Path.mkdir))
    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))
    return left


def test_a_kill_at_any_point_leaves_a_whole_one(tmp_path: Path, syscalls: list[int]) -> None:
    points = 0
    while True:
        folder = tmp_path / str(points)
        save(folder, 5)
        save(folder, 10)
        syscalls[0] = points + 1
        try:
            save(folder, 15)
        except Killed:
            points += 1
        else:
            break
        finally:
            syscalls[0] = -1
        assert_whole(checkpoint.latest(folder), 10, 15)
        save(folder, 20)
        assert_whole(checkpoint.latest(folder), 20)
        assert len(list(folder.iterdir())) == 2
    # three files opened and synced, two torch.save, two folders, two renames, one removal
    assert points >= 13


def test_a_half_removed_old_one_does_not_pass_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10)

    def remove_half(path: Path) -> None:
        (path / "shared.pt").unlink()
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", remove_half)
    with pytest.raises(Killed):
        save(tmp_path, 15)
    whole = sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".tmp")
    assert whole == ["step-00000010", "step-00000015"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "fashion-mnist"}, "data digits, here fashion-mnist"),
        ({"ranks": 4}, "ranks 1, here 4"),
        ({"q": 0.5}, "q 0.99, here 0.5"),
        ({"model": {"weight": [2, 4], "bias": [2]}}, r"model weight \[2, 3\], here \[2, 4\]"),
        ({"model": {"weight": [2, 3]}}, r"model bias \[2\], here absent"),
        ({"seed": 3}, "seed unknown, here 3"),
    ],
)
def test_another_runs_is_refused_naming_both_sides(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    save(tmp_path, 5)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    with pytest.raises(CheckpointError, match=message) as error_info:
        checkpoint.check(newest, {**CONFIG, **change})
    assert str(newest) in str(error_info.value)


@pytest.mark.parametrize("config", [b"", b"[]", b"{", b"\xff"])
def test_a_broken_config_is_named(tmp_path: Path, config: bytes) -> None:
    save(tmp_path, 5)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    (newest / "config.json").write_bytes(config)
    with pytest.raises(CheckpointError, match="step-00000005 cannot be read"):
        checkpoint.check(newest, CONFIG)


@pytest.mark.parametrize("name", ["shared.pt", "rank-0.pt"])
@pytest.mark.parametrize("damage", ["cut", "gone", "pickle"])
def test_a_broken_file_is_named_and_never_unpickled(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 5)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None
    file = newest / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-200])
    if damage == "gone":
        file.unlink()
    if damage == "pickle":
        torch.save({"callable": json.dumps}, file)
    with pytest.raises(CheckpointError, match=rf"step-00000005 cannot be read \({name}"):
        checkpoint.load(newest, 0)


def test_a_file_without_what_a_rank_needs_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    torch.save({"model": 1}, folder / "shared.pt")
    torch.save({"generator": 1}, folder / "rank-0.pt")
    checkpoint.check_files(folder, 1, shared={"model"}, own={"generator"})
    with pytest.raises(CheckpointError, match=r"rank-0.pt lacks topq"):
        checkpoint.check_files(folder, 1, shared={"model"}, own={"generator", "topq"})
    (folder / "rank-0.pt").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match=r"rank-0.pt"):
        checkpoint.check_files(folder, 1, shared={"model"}, own={"generator"})

"""A snapshot is wholly the old or the new one, and one that is damaged in any bit is refused."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import killed_saves
import pytest
import torch
from killed_saves import TRAINING, snapshot_of
from safetensors.torch import load_file

from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.protocol.config import GroupRule, TrainingConfig
from topq_dist.ps.protocol.types import ModelVersion
from topq_dist.ps.state import snapshot_file, state_dir
from topq_dist.ps.state.directory_lock import LockLostError
from topq_dist.ps.state.snapshot import Snapshot, check_same_training, training_json
from topq_dist.ps.state.snapshot_file import StateError
from topq_dist.ps.state.state_dir import StateDir


def small() -> Snapshot:
    """Return a snapshot with all dtypes, odd shapes and names, in a file of few bytes."""
    tensors = {
        "é/\"'\n": torch.tensor([[1.0, float("nan")], [float("inf"), -0.0]]),
        "half": torch.tensor([1.0, 2.5, -3.0], dtype=torch.bfloat16),
        "fp16": torch.tensor(6e-8, dtype=torch.float16),
        "fp64": torch.tensor([[[1e300]]], dtype=torch.float64),
        "step": torch.tensor(7, dtype=torch.int64),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 3),
    }
    return Snapshot(
        run="run",
        point=ModelVersion(version=3, chain=bytes(range(32))),
        training=training_json(TRAINING),
        spec=ModelSpec.of([("b", tensors["half"]), ("a", tensors["fp64"])]),
        ledger={"version": 3, "workers": {"a": {"epoch": 1}}},
        workers=("a", "b"),
        history={"versions": []},
        history_payloads=[memoryview(b"one"), memoryview(b""), memoryview(bytearray(b"three"))],
        central={"groups": [{"lr": 0.1, "betas": [0.9, 0.999]}]},
        tensors=tensors,
    )


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    plain = tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensor.dtype, tensor.shape, plain.view(-1).view(torch.uint8).numpy().tobytes()


def assert_same(loaded: Snapshot | None, saved: Snapshot) -> None:
    assert loaded is not None
    assert {name: bits(tensor) for name, tensor in loaded.tensors.items()} == {
        name: bits(tensor) for name, tensor in saved.tensors.items()
    }
    assert b"".join(loaded.history_payloads) == b"".join(saved.history_payloads)
    assert replace(loaded, tensors={}, history_payloads=()) == replace(
        saved, tensors={}, history_payloads=()
    )


def test_a_new_directory_has_no_snapshot(tmp_path: Path) -> None:
    with StateDir(tmp_path / "new" / "state") as state:
        assert state.load() is None
        assert stat.S_IMODE(state.path.stat().st_mode) == 0o700


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    with StateDir(tmp_path) as state:
        state.save(small())
        assert stat.S_IMODE(state.snapshot_path.stat().st_mode) == 0o600
        assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "snapshot.safetensors"]
    with StateDir(tmp_path) as state:
        assert_same(state.load(), small())
        later = replace(
            small(), point=ModelVersion(version=4, chain=bytes(32)), ledger={"version": 4}
        )
        state.save(later)
        assert_same(state.load(), later)


def test_a_loaded_snapshot_outlives_the_next(tmp_path: Path) -> None:
    with StateDir(tmp_path) as state:
        state.save(snapshot_of(1))
        loaded = state.load()
        state.save(snapshot_of(2))
        assert_same(loaded, snapshot_of(1))


def test_the_file_is_safetensors(tmp_path: Path) -> None:
    with StateDir(tmp_path) as state:
        state.save(small())
        tensors = load_file(state.snapshot_path)
    assert bytes(tensors["history"].numpy()) == b"onethree"
    assert bits(tensors["central/half"]) == bits(small().tensors["half"])


def test_tensors_that_are_no_plain_memory(tmp_path: Path) -> None:
    matrix = torch.arange(6.0).view(2, 3)
    awkward = {
        "transposed": matrix.t(),
        "column": matrix[:, 1],
        "element": matrix[:1, 1],
        "expanded": matrix[0, 1].expand(4),
        "parameter": torch.nn.Parameter(matrix),
    }
    with StateDir(tmp_path) as state:
        state.save(replace(small(), tensors=awkward))
        assert_same(state.load(), replace(small(), tensors=awkward))


def test_an_older_version_does_not_replace_a_newer(tmp_path: Path) -> None:
    with StateDir(tmp_path) as state:
        state.save(snapshot_of(5))
        with pytest.raises(ValueError, match="version=4: expected 5 or later"):
            state.save(snapshot_of(4))
        state.save(snapshot_of(5))
    with StateDir(tmp_path) as state:
        assert_same(state.load(), snapshot_of(5))
        with pytest.raises(ValueError, match="expected 5 or later"):
            state.save(snapshot_of(4))


@pytest.mark.parametrize(
    "tensors",
    [
        {"complex": torch.zeros(2, dtype=torch.complex64)},
        {"sparse": torch.eye(2).to_sparse()},
        {"meta": torch.empty(2, device="meta")},
        {"\ud800": torch.zeros(2)},
    ],
)
def test_what_cannot_be_saved_leaves_the_old_one(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    with StateDir(tmp_path) as state:
        state.save(small())
        with pytest.raises(ValueError, match=r"tensor|surrogates"):
            state.save(replace(small(), tensors=tensors))
        assert_same(state.load(), small())
        assert len(list(tmp_path.iterdir())) == 2


# Damage


def test_each_flipped_bit_is_noticed(tmp_path: Path) -> None:
    with StateDir(tmp_path) as state:
        state.save(small())
        whole = state.snapshot_path.read_bytes()
        assert len(whole) < 3000
        beginning = 8 * 250  # where the digest does not yet decide: each bit; then one a byte
        for place in [*range(beginning), *range(beginning, 8 * len(whole), 9)]:
            damaged = bytearray(whole)
            damaged[place // 8] ^= 1 << place % 8
            state.snapshot_path.write_bytes(damaged)
            with pytest.raises(StateError, match=r"snapshot\.safetensors"):
                state.load()
        state.snapshot_path.write_bytes(whole)
        assert_same(state.load(), small())


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, 300, -100, -1])
def test_a_file_cut_short_is_no_fresh_start(tmp_path: Path, length: int) -> None:
    with StateDir(tmp_path) as state:
        state.save(small())
        whole = state.snapshot_path.read_bytes()
        state.snapshot_path.write_bytes(whole[:length])
        with pytest.raises(StateError, match="damaged"):
            state.load()
        state.snapshot_path.write_bytes(whole + b"\0")
        with pytest.raises(StateError, match="damaged"):
            state.load()


def test_another_format_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StateDir(tmp_path) as state:
        monkeypatch.setattr(snapshot_file, "FORMAT_VERSION", 2)
        state.save(small())
        monkeypatch.undo()
        with pytest.raises(StateError, match=r"version 2.*reads version 1"):
            state.load()


def test_a_ledger_of_another_version_is_no_snapshot(tmp_path: Path) -> None:
    with StateDir(tmp_path) as state:
        state.save(replace(small(), ledger={"version": 2}))
        with pytest.raises(StateError, match="ledger of version 2"):
            state.load()


def test_a_snapshot_that_cannot_be_read_is_no_fresh_start(tmp_path: Path) -> None:
    with StateDir(tmp_path) as state:
        state.snapshot_path.mkdir()
        with pytest.raises(StateError, match="cannot be read"):
            state.load()


# Writing


def test_the_disk_has_the_file_before_its_name_and_then_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(file: int) -> None:
        is_directory = stat.S_ISDIR(os.fstat(file).st_mode)
        size = 0 if is_directory else os.fstat(file).st_size
        order.append("directory" if is_directory else f"file of {size} bytes")
        real_fsync(file)

    def rename(source: Path, target: Path) -> Path:
        order.append("rename")
        return real_replace(source, target)

    with StateDir(tmp_path) as state:
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(Path, "replace", rename)
        state.save(small())
        size = state.snapshot_path.stat().st_size
    assert order == [f"file of {size} bytes", "rename", "directory"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, chunk: real(file, chunk[:7]))
    with StateDir(tmp_path) as state:
        state.save(small())
        assert_same(state.load(), small())


def test_a_full_disk_leaves_the_old_one_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, chunk: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with StateDir(tmp_path) as state:
        state.save(snapshot_of(1))
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", full)
            with pytest.raises(StateError, match=r"was not saved: .*No space left"):
                state.save(snapshot_of(2))
        assert_same(state.load(), snapshot_of(1))
        assert len(list(tmp_path.iterdir())) == 2
        state.save(snapshot_of(2))
        assert_same(state.load(), snapshot_of(2))


def test_saving_allocates_next_to_nothing(tmp_path: Path) -> None:
    # fresh process: the peak of this one's memory may be another test's
    script = """
import resource, sys, torch
from dataclasses import replace
from killed_saves import snapshot_of
from topq_dist.ps.state.state_dir import StateDir
large = replace(snapshot_of(1), tensors={"large": torch.ones(32 << 20)},
    history_payloads=[memoryview(bytearray(b"x") * (32 << 20))])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
StateDir(sys.argv[1]).save(large)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert int(done.stdout) < 16 << 10  # KiB, of 160 MiB saved


# Killing


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    directory = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, killed_saves.__file__, directory],
        capture_output=True,
        text=True,
        check=True,
        timeout=90,
    )
    return directory, [line.split() for line in done.stdout.splitlines()]


@pytest.mark.parametrize("point", killed_saves.POINTS)
def test_killed_at_a_point(killed: tuple[Path, list[list[str]]], point: str) -> None:
    directory, lines = killed
    assert [point, str(int(signal.SIGKILL))] in lines
    found = 2 if killed_saves.POINTS[point] else 1
    left = list((directory / point).glob("*partial"))
    assert bool(left) == (found == 1)
    (directory / point / "snapshot.safetensors.partial").touch()  # as they were named once
    with StateDir(directory / point) as state:
        assert not list(state.path.glob("*partial"))
        assert_same(state.load(), snapshot_of(found))
        state.save(snapshot_of(3))
        assert_same(state.load(), snapshot_of(3))


def test_killed_at_any_moment(killed: tuple[Path, list[list[str]]]) -> None:
    directory, lines = killed
    moments = [
        (int(said), int(found))
        for name, said, found in (line for line in lines if line[0] == "moment")
    ]
    assert len(moments) == killed_saves.MOMENTS
    # what save had returned from is there; one more may be
    assert all(said <= found <= said + 1 for said, found in moments)
    assert moments[-1][1] > 1
    with StateDir(directory / "moments") as state:
        assert_same(state.load(), snapshot_of(moments[-1][1]))


# Locking


def test_a_second_server_is_told_who_has_it(tmp_path: Path) -> None:
    holder = StateDir(tmp_path)
    script = "import sys; from topq_dist.ps.state.state_dir import StateDir; StateDir(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert f"{tmp_path} is in use by process {os.getpid()} on " in done.stderr
    holder.save(small())
    holder.close()
    with pytest.raises(ValueError, match="closed"):
        holder.save(small())
    with StateDir(tmp_path) as state:
        assert_same(state.load(), small())


def test_a_path_that_can_be_no_directory(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "below"):
        with pytest.raises(StateError, match=str(path)):
            StateDir(path)


# Configuration


def test_the_training_must_be_the_same() -> None:
    training = TrainingConfig(
        inner_opt="adamw",
        options={"lr": 0.1, "betas": (0.9, 0.99)},
        groups=(GroupRule(pattern="*.bias", options={"weight_decay": 0}),),
        downlink="topq",
    )
    saved = training_json(training)
    check_same_training(saved, training)
    for other, difference in [
        (replace(training, mode="async"), r"mode is 'async', and 'sync' in the snapshot"),
        (replace(training, q=0.5), r"q is 0\.5, and 0\.99"),
        (
            replace(training, options={"lr": 0.2, "betas": (0.9, 0.99)}),
            r"options\.lr is 0\.2, and 0\.1",
        ),
        (replace(training, options={"lr": 0.1}), r"options\.betas is not given, and \[0\.9, "),
        (
            replace(training, options={**training.options, "eps": 1e-3}),
            r"options\.eps is 0\.001, and not given",
        ),
        (replace(training, groups=()), r"groups is \[\], and \[\{"),
    ]:
        with pytest.raises(StateError, match=difference):
            check_same_training(saved, other)


def test_an_option_that_json_cannot_hold_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="options: expected numbers"):
        training_json(TrainingConfig(inner_opt="sgd", options={"lr": torch.tensor(0.1)}))


class TestThePrevious:
    def test_the_one_before_the_latest_is_kept(self, tmp_path: Path) -> None:
        with StateDir(tmp_path) as state:
            for version in (1, 2, 2, 3, 3):
                state.save(snapshot_of(version))
            state.previous_path.replace(state.snapshot_path)
        with StateDir(tmp_path) as state:
            assert_same(state.load(), snapshot_of(2))

    def test_where_the_latest_is_damaged_it_is_named(self, tmp_path: Path) -> None:
        with StateDir(tmp_path) as state:
            state.save(snapshot_of(1))
            state.snapshot_path.write_bytes(b"?")
            with pytest.raises(StateError) as alone:
                state.load()
            assert "previous" not in str(alone.value)
        with StateDir(tmp_path / "two") as state:
            state.save(snapshot_of(1))
            state.save(snapshot_of(2))
            state.snapshot_path.write_bytes(state.snapshot_path.read_bytes()[:-1])
            with pytest.raises(StateError, match=r"damaged.*snapshot\.previous\.safetensors"):
                state.load()

    def test_without_hard_links_there_is_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def link(*_: object) -> None:
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", link)
        with StateDir(tmp_path) as state:
            for version in (1, 2):
                state.save(snapshot_of(version))
            assert not state.previous_path.exists()
            assert_same(state.load(), snapshot_of(2))


class TestALockThatIsRemoved:
    def test_it_is_taken_again_where_nobody_came_in_between(self, tmp_path: Path) -> None:
        with StateDir(tmp_path) as state:
            state.save(snapshot_of(1))
            (tmp_path / "lock").unlink()
            state.save(snapshot_of(2))
            with pytest.raises(StateError, match="in use by process"):
                StateDir(tmp_path)
            assert_same(state.load(), snapshot_of(2))

    def test_nothing_is_written_where_another_server_has_it(self, tmp_path: Path) -> None:
        with StateDir(tmp_path) as first:
            first.save(snapshot_of(1))
            (tmp_path / "lock").unlink()
            with StateDir(tmp_path) as second:
                with pytest.raises(LockLostError, match="its lock file was removed"):
                    first.save(snapshot_of(2))
                assert_same(second.load(), snapshot_of(1))
                second.save(snapshot_of(5))
            # it is gone again, and what it wrote is not to be overwritten
            with pytest.raises(LockLostError, match="was written by somebody else"):
                first.save(snapshot_of(2))

    def test_who_has_lost_it_touches_nothing_that_the_other_writes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rename = state_dir._rename

        def late(partial: Path, path: Path) -> None:
            monkeypatch.setattr(state_dir, "_rename", rename)
            with pytest.raises(LockLostError):
                first.save(snapshot_of(2))
            rename(partial, path)

        with StateDir(tmp_path) as first:
            first.save(snapshot_of(1))
            (tmp_path / "lock").unlink()
            with StateDir(tmp_path) as second:
                monkeypatch.setattr(state_dir, "_rename", late)
                second.save(snapshot_of(5))
                assert_same(second.load(), snapshot_of(5))

    def test_a_folder_that_is_gone_is_an_error_and_no_end(self, tmp_path: Path) -> None:
        with StateDir(tmp_path / "state") as state:
            state.save(snapshot_of(1))
            state.path.rename(tmp_path / "elsewhere")
            with pytest.raises(StateError, match="was not saved"):
                state.save(snapshot_of(2))
            (tmp_path / "elsewhere").rename(state.path)
            state.save(snapshot_of(2))


def test_a_directory_that_cannot_be_used_is_not_kept_locked(tmp_path: Path) -> None:
    in_the_way = tmp_path / "snapshot.safetensors.0.partial"
    in_the_way.mkdir()
    with pytest.raises(StateError, match="directory"):
        StateDir(tmp_path)
    in_the_way.rmdir()
    with StateDir(tmp_path) as directory:
        assert directory.load() is None

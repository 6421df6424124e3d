"""A process whose children save snapshots until they are killed, at a point or at any moment.

Run as: killed_saves.py DIRECTORY. Forks a child for each point, so that torch is imported once;
each works in DIRECTORY/POINT, where it saves version 1, and is killed while it saves version 2.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.protocol.config import TrainingConfig
from topq_dist.ps.protocol.types import START, ModelVersion
from topq_dist.ps.state import snapshot_file, state_dir
from topq_dist.ps.state.snapshot import Snapshot, training_json
from topq_dist.ps.state.state_dir import StateDir

TRAINING = TrainingConfig(inner_opt="sgd", options={"lr": 0.1})
WRITES = 6  # of a snapshot of `snapshot_of`: header, two of the matrix, scale, metadata, history
POINTS = {
    "before-write": False,
    **{f"write-{count}": False for count in range(1, WRITES + 1)},
    "before-digest": False,
    "before-fsync": False,
    "before-rename": False,
    "after-rename": True,
}
MOMENTS = 20


def snapshot_of(version: int) -> Snapshot:
    """Return a snapshot all of whose parts tell its version."""
    matrix = torch.full((1000, 400), float(version))
    payload = version.to_bytes(4, "little") * 25
    return Snapshot(
        run="run",
        point=ModelVersion(version=version, chain=bytes([version % 256]) * 32)
        if version
        else START,
        training=training_json(TRAINING),
        spec=ModelSpec.of([("matrix", matrix)]),
        ledger={"version": version},
        history={"version": version},
        history_payloads=[memoryview(payload)],
        central={"version": version},
        tensors={"matrix": matrix, "scale": torch.tensor(version, dtype=torch.bfloat16)},
    )


def _die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before(module: Any, name: str) -> None:
    setattr(module, name, _die)


def _after(module: Any, name: str) -> None:
    real = getattr(module, name)

    def run_and_die(*arguments: object) -> None:
        real(*arguments)
        _die()

    setattr(module, name, run_and_die)


def _in_write(count: int) -> None:
    real, left = snapshot_file._write, count

    def write_half_and_die(file: int, chunk: memoryview) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.write(file, chunk[: max(1, chunk.nbytes // 2)])
            _die()
        real(file, chunk)

    snapshot_file._write = write_half_and_die


def _arm(point: str) -> None:
    if point == "before-write":
        _before(state_dir, "write_snapshot_file")
    elif point == "before-digest":
        _before(os, "pwrite")
    elif point == "before-fsync":
        _after(state_dir, "write_snapshot_file")
    elif point == "before-rename":
        _before(state_dir, "_rename")
    elif point == "after-rename":
        _before(state_dir, "_sync_directory")
    else:
        _in_write(int(point.removeprefix("write-")))


def _save_and_die(directory: Path, point: str) -> None:
    state = StateDir(directory)
    state.save(snapshot_of(1))
    _arm(point)
    state.save(snapshot_of(2))


def _save_for_ever(directory: Path, told: int) -> None:
    state = StateDir(directory)
    latest = state.load()
    version = latest.point.version if latest else 0
    said = os.open(directory / "said", os.O_WRONLY | os.O_CREAT)
    while True:
        # first what was found: the one before may have been killed before it said so
        os.pwrite(said, b"%10d" % version, 0)
        os.write(told, b".")
        version += 1
        state.save(snapshot_of(version))


def _fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)  # whoever gets here was not killed
    return child


def _main(directory: Path) -> None:
    for point in POINTS:
        child = _fork(lambda point=point: _save_and_die(directory / point, point))  # type: ignore[misc]
        print(point, -os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    moments = random.Random(4)
    save_s = 0.02
    for _ in range(MOMENTS):
        heard, told = os.pipe()
        child = _fork(lambda told=told: _save_for_ever(directory / "moments", told))  # type: ignore[misc]
        os.close(told)
        # so many saves, as long as they take here, and then within the next
        os.read(heard, 1)
        began_s = time.monotonic()
        saves = moments.randrange(3)
        for _ in range(saves):
            os.read(heard, 1)
        if saves:
            save_s = (time.monotonic() - began_s) / saves
        time.sleep(save_s * moments.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(heard)
        last = directory / "moments" / "said"
        with StateDir(directory / "moments") as state:
            latest = state.load()
        found = latest.point.version if latest else 0
        said = int(last.read_text() or 0) if last.exists() else 0
        print("moment", said, found, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _main(Path(sys.argv[1]))

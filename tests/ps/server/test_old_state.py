"""States of an older release: read, replayed, and gone on from to the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ps.old_state import CHECKPOINT_STEP, LAST_STEP, SERVING, TRAINING, WORKERS, Model, connect
from ps.old_state import take_steps as take
from ps.servers import serving
from ps.workers import side_by_side
from torch import Tensor

SAVED = Path(__file__).parents[2] / "data" / "old_state"


def read(name: str) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(SAVED / name, weights_only=True)
    return saved


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], *, exactly: bool) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if exactly:
            assert torch.equal(found[name], tensor), name
        else:
            torch.testing.assert_close(found[name], tensor)


def are_to_the_bit(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Return whether they are, and if not, that no number is further off than a few last bits."""
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2.0**-21, atol=0.0)
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.usefixtures("one_thread")
def test_server_and_workers_go_on_to_where_they_came_then(tmp_path: Path) -> None:
    then = read("then.pt")
    # other vector instructions may round AdamW's step elsewhere
    exactly = torch.backends.cpu.get_cpu_capability() == then["cpu_capability"]
    shutil.copy(SAVED / "snapshot.safetensors", tmp_path)
    with serving(tmp_path, TRAINING, **SERVING) as server:
        assert server.coordinator.status().point.version == 1
        models = {worker: Model() for worker in WORKERS}
        joined = side_by_side(
            len(WORKERS),
            lambda place: connect(models[WORKERS[place]], WORKERS[place], str(server.address)),
        )
        optimizers = dict(zip(WORKERS, joined, strict=True))
        for worker in WORKERS:
            saved = read(f"{worker}.pt")
            optimizers[worker].load_state_dict(saved["optimizer"])
            models[worker].load_state_dict(saved["model"])
        take(models, optimizers, range(CHECKPOINT_STEP, LAST_STEP))
        status = server.coordinator.status(state_sha256=True)
        assert status.point.version == LAST_STEP
        central = optimizers["w0"].fetch_central()
        assert_same(central, then["central"], exactly=False)
        for worker in WORKERS:
            assert_same(dict(models[worker].state_dict()), then["models"][worker], exactly=exactly)
        # nor is its step the same on all processors with these instructions
        if exactly and are_to_the_bit(central, then["central"]):
            assert status.state_sha256 == then["state_sha256"]
        side_by_side(len(WORKERS), lambda place: optimizers[WORKERS[place]].close())

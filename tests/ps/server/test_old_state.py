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
# of the same state where `elsewhere` is what AdamW's step comes to
SHA256_ELSEWHERE = "1cceeb1201ee7aa67405d4c4378295c243df2552023d61d9eb5baad68ad2ad0f"


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


def elsewhere(central: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `central` as processors come to whose AdamW rounds three last bits downwards."""
    weight = central["weight"].clone()
    for place in ((1, 3), (6, 7), (11, 11)):
        weight[place] = torch.nextafter(weight[place], torch.tensor(-torch.inf))
    return central | {"weight": weight}


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
        central, state_sha256 = then["central"], then["state_sha256"]
        found = optimizers["w0"].fetch_central()
        if not torch.equal(found["weight"], central["weight"]):
            central, state_sha256 = elsewhere(central), SHA256_ELSEWHERE
        assert_same(found, central, exactly=exactly)
        for worker in WORKERS:
            assert_same(dict(models[worker].state_dict()), then["models"][worker], exactly=exactly)
        if exactly:
            assert status.state_sha256 == state_sha256
        side_by_side(len(WORKERS), lambda place: optimizers[WORKERS[place]].close())

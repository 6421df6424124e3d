"""A snapshot whose digest fits and whose contents do not: always the promised error, and early."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from mutants import mutants
from ps.bench import Make, push_of
from torch import Tensor

from topq_dist.ps.protocol.config import TrainingConfig
from topq_dist.ps.protocol.types import Push
from topq_dist.ps.state.run_state import RunState
from topq_dist.ps.state.snapshot_file import StateError, read_snapshot_file, write_snapshot_file
from topq_dist.ps.state.state_dir import StateDir
from topq_dist.ps.training.step_guard import NonFiniteStepError

# 10,000 take some minutes
MUTANTS = 300
OPTIMIZERS: list[dict[str, Any]] = [
    {"inner_opt": "adamw", "options": {"lr": 0.01}, "downlink": "topq", "q": 0.5},
    {"inner_opt": "sgd", "options": {"lr": 0.1, "momentum": 0.9}, "momentum": "optimizer"},
]


@dataclasses.dataclass
class Saved:
    """A run's snapshot as a tree that can be changed, and a push that it would take next."""

    training: TrainingConfig
    tree: dict[str, Any]
    push: Push

    def write(self, tree: Any, folder: Path) -> None:
        contents: dict[str, Any] = dict(tree["tensors"])
        contents["metadata"] = [memoryview(json.dumps(tree["metadata"]).encode())]
        file = os.open(folder / "snapshot.safetensors", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            write_snapshot_file(file, contents)
        finally:
            os.close(file)


@pytest.fixture(params=OPTIMIZERS, ids=["adamw", "sgd"])
def saved(request: pytest.FixtureRequest, make: Make) -> Saved:
    bench = make(request.param)
    a, b = bench.join("a"), bench.join("b")
    for step in range(1, 4):
        bench.round(step, a, b)
    bench.save()
    contents = read_snapshot_file(bench.state_dir.snapshot_path)
    metadata = json.loads(bytes(contents.pop("metadata").numpy()))
    tensors = {name: tensor.clone() for name, tensor in contents.items()}
    push = push_of(a, 4, bench.point)
    return Saved(bench.training, {"tensors": tensors, "metadata": metadata}, push)


@pytest.mark.usefixtures("one_thread")
def test_it_is_refused_by_name_or_gone_on_from(saved: Saved, tmp_path: Path) -> None:
    refused = gone_on = 0
    with StateDir(tmp_path / "hostile") as state_dir:
        for mutant in mutants(saved.tree, MUTANTS, seed=1):
            if not all(isinstance(one, Tensor) for one in _tensors(mutant)):
                continue
            try:
                saved.write(mutant, state_dir.path)
            except (TypeError, ValueError):
                continue  # no file can hold it
            try:
                loaded = RunState.load(state_dir, saved.training, history_bytes=1 << 20)
            except StateError:
                refused += 1
                continue
            assert loaded is not None
            try:
                loaded[0].central.check_push(saved.push)
                loaded[0].apply([saved.push])
            except (NonFiniteStepError, ValueError):
                pass  # of the ledger: it knows another number
            gone_on += 1
    assert refused > MUTANTS / 2
    assert gone_on > 0


def _tensors(mutant: Any) -> list[Any]:
    tensors = mutant.get("tensors")
    return list(tensors.values()) if isinstance(tensors, dict) and "metadata" in mutant else [None]

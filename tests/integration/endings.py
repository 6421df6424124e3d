"""The files that a server left on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from topq_dist.ps.model.flat import FlatModel
from topq_dist.ps.protocol.config import TrainingConfig
from topq_dist.ps.state.run_state import RunState
from topq_dist.ps.state.snapshot_file import read_snapshot_file
from topq_dist.ps.state.state_dir import SNAPSHOT_NAME, StateDir


@dataclass(frozen=True, kw_only=True)
class Ending:
    """The remains of a server that has ended: equal ones are the same run, bit for bit.

    applied: pushes applied of each worker. parameters_sha256: of the central parameters.
    state_sha256: of these, the optimizer's state, what workers still lack, and the chain, in which
    are number and bytes of each push that was ever applied.
    """

    version: int
    applied: dict[str, int]
    parameters_sha256: str
    state_sha256: str


def ending(state_dir: Path, training: TrainingConfig) -> Ending:
    """Read what the server left in its state directory."""
    with StateDir(state_dir) as directory:
        loaded = RunState.load(directory, training, history_bytes=1 << 30)
        assert loaded is not None
        state, _ = loaded
        digest = hashlib.sha256()
        for vector in state.central.central_raw():
            digest.update(vector)
        return Ending(
            version=state.point.version,
            applied={
                worker: state.ledger.next_sequence(worker) - 1 for worker in state.ledger.workers
            },
            parameters_sha256=digest.hexdigest(),
            state_sha256=state.sha256(),
        )


def central_parameters(state_dir: Path, training: TrainingConfig) -> Tensor:
    """Return the central parameters that the server left, as one vector."""
    with StateDir(state_dir) as directory:
        loaded = RunState.load(directory, training, history_bytes=1 << 30)
        assert loaded is not None
        state, _ = loaded
        model = FlatModel(state.spec)
        model.load_raw(state.central.central_raw())
        return torch.cat([tensor.flatten() for tensor in model.tensors().values()])


def durable_version(state_dir: Path) -> int:
    """Return the version of the snapshot on disk; -1: there is none."""
    try:
        contents = read_snapshot_file(state_dir / SNAPSHOT_NAME)
    except FileNotFoundError:
        return -1
    metadata = json.loads(contents["metadata"].numpy().tobytes())
    return int(metadata["point"]["version"])

"""Snapshots of a server: what it goes on from, as a file holds it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from topq_dist.ps.model.spec import DTYPES, ModelSpec, TensorSpec
from topq_dist.ps.protocol.config import TrainingConfig
from topq_dist.ps.protocol.types import (
    ModelVersion,
    check_worker_name,
    point_from_state,
    point_to_state,
)
from topq_dist.ps.state.snapshot_file import (
    Contents,
    StateError,
)

_METADATA = "metadata"
_HISTORY = "history"
_CENTRAL = "central/"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All that a server goes on from: what it is at `point`, in parts that cannot disagree.

    run: its id. training: as `training_json` returns it. spec: the run's model.
    ledger: as Ledger.to_json returns it. history, history_payloads: as UpdateLog.state does; the
    payloads of a loaded snapshot are in one piece. central, tensors: as CentralModel.state does.
    workers: whose leases ran.
    """

    run: str
    point: ModelVersion
    training: Mapping[str, Any]
    spec: ModelSpec
    ledger: Mapping[str, Any]
    history: Mapping[str, Any]
    history_payloads: Sequence[memoryview]
    central: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    workers: Sequence[str] = ()


def training_json(training: TrainingConfig) -> dict[str, Any]:
    """Return the configuration as JSON holds it; raises ValueError for an option that it cannot."""
    tree = dataclasses.asdict(training.begun())
    try:
        plain: dict[str, Any] = json.loads(json.dumps(tree))
    except TypeError as error:
        raise ValueError(f"options: expected numbers, texts and lists of them: {error}") from error
    return plain


def check_same_training(saved: Mapping[str, Any], training: TrainingConfig) -> None:
    """Raise StateError, naming the first difference, unless `saved` is training_json's of it."""
    begun = training.begun(saved)
    # before it could be said, momentum was the optimizer's, and no rate was adapted
    saved = {"momentum": "optimizer", "adapt_rate": False, **saved}
    if begun.momentum == "optimizer":  # the rate follows feedback alone
        saved["adapt_rate"] = begun.adapt_rate
    difference = _first_difference("", training_json(begun), saved)
    if difference is not None:
        raise StateError(
            f"{difference} in the snapshot: expected the same as when the run began, or another "
            "state directory for another run"
        )


def _first_difference(name: str, given: object, saved: object) -> str | None:
    if isinstance(given, Mapping) and isinstance(saved, Mapping):
        for key in sorted(given.keys() | saved.keys()):
            part = f"{name}.{key}" if name else key
            if key not in saved:
                return f"{part} is {given[key]!r}, and not given"
            if key not in given:
                return f"{part} is not given, and {saved[key]!r}"
            found = _first_difference(part, given[key], saved[key])
            if found is not None:
                return found
        return None
    return None if given == saved else f"{name} is {given!r}, and {saved!r}"


def packed(snapshot: Snapshot) -> dict[str, Contents]:
    """Return what a file is to hold of a snapshot."""
    metadata = {
        "run": snapshot.run,
        "workers": list(snapshot.workers),
        "point": point_to_state(snapshot.point),
        "training": snapshot.training,
        "spec": [
            [tensor.name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
            for tensor in snapshot.spec.tensors
        ],
        "ledger": snapshot.ledger,
        "history": snapshot.history,
        "central": snapshot.central,
    }
    contents: dict[str, Contents] = {
        # as a tensor, because readers bound the header's length
        _METADATA: [memoryview(json.dumps(metadata).encode())],
        _HISTORY: snapshot.history_payloads,
    }
    return contents | {_CENTRAL + name: tensor for name, tensor in snapshot.tensors.items()}


def unpacked(contents: Mapping[str, Tensor]) -> Snapshot:
    """Return the snapshot that a file holds; raises anything where it holds none."""
    metadata = json.loads(bytes(_view(contents[_METADATA])))
    point = point_from_state(metadata["point"])
    if metadata["ledger"]["version"] != point.version:
        raise ValueError(f"{point} beside a ledger of version {metadata['ledger']['version']}")
    return Snapshot(
        run=metadata["run"],
        workers=tuple(check_worker_name(worker) for worker in metadata["workers"]),
        point=point,
        training=metadata["training"],
        spec=ModelSpec(
            tensors=tuple(
                TensorSpec(name=name, shape=tuple(shape), dtype=DTYPES[dtype])
                for name, shape, dtype in metadata["spec"]
            )
        ),
        ledger=metadata["ledger"],
        history=metadata["history"],
        history_payloads=[_view(contents[_HISTORY])],
        central=metadata["central"],
        tensors={
            name.removeprefix(_CENTRAL): tensor
            for name, tensor in contents.items()
            if name.startswith(_CENTRAL)
        },
    )


def _view(tensor: Tensor) -> memoryview:
    if tensor.dtype != torch.uint8:
        raise ValueError(f"bytes stored as {tensor.dtype}")
    return tensor.numpy().data

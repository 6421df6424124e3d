"""Joins that a server refuses: those with another model than the run's, and those that are none."""

from __future__ import annotations

import secrets
from typing import Any

import torch
from ps.server.guarded_run import Act, Run
from ps.strangers import CALL_S, model
from torch import Tensor

from topq_dist.ps.wire import codec
from topq_dist.v1 import parameter_server_pb2 as pb


def other_models() -> dict[str, tuple[dict[str, Tensor], str]]:
    same = model()
    bias = same["a.bias"]
    return {
        "shape": (
            same | {"a.weight": torch.zeros(3, 2)},
            "tensor 'a.weight' has shape (3, 2) here and (2, 3) in the run",
        ),
        "dtype": (
            same | {"a.bias": bias.double()},
            "tensor 'a.bias' has dtype torch.float64 here and torch.float32 in the run",
        ),
        "name": (
            {"a.weight": same["a.weight"], "b.bias": bias, "scale": same["scale"]},
            "tensor 'a.bias' of the run is missing here",
        ),
        "one more": (same | {"z": bias}, "tensor 'z' is here and not in the run"),
        "order": (dict(reversed(same.items())), "expected the same order"),
    }


def joining(**changes: Any) -> Act:
    """Return what has bob join with these fields of the message."""

    def act(run: Run) -> None:
        fields: dict[str, Any] = {
            "worker": "bob",
            "instance": secrets.token_bytes(16),
            "model": codec.spec_to_wire(run.alice.spec),
        }
        run.bob().stub.Join(pb.JoinRequest(**fields | changes), timeout=CALL_S)

    return act


def tensor(name: str = "t", shape: tuple[int, ...] = (1,), dtype: str = "float32") -> pb.TensorSpec:
    return pb.TensorSpec(name=name, shape=shape, dtype=dtype)


BAD_JOINS: dict[str, tuple[Act, str, str, tuple[str, ...]]] = {
    "no tensors": (joining(model=[]), "INVALID_ARGUMENT", "invalid", ("no tensors",)),
    "no name": (joining(model=[tensor("")]), "INVALID_ARGUMENT", "invalid", ("not empty",)),
    "no dtype": (joining(model=[tensor(dtype="")]), "INVALID_ARGUMENT", "invalid", ("dtype ''",)),
    "a long dtype": (
        joining(model=[tensor(dtype="x" * 3_000_000)]),
        "INVALID_ARGUMENT",
        "invalid",
        ("tensor 't'", "expected one of"),
    ),
    "a long name": (
        joining(model=[tensor("x" * 3_000_000)]),
        "FAILED_PRECONDITION",
        "model_differs",
        ("tensor",),
    ),
    "twice": (
        joining(model=[tensor(), tensor()]),
        "INVALID_ARGUMENT",
        "invalid",
        ("'t' comes twice",),
    ),
    "a large shape": (
        joining(model=[tensor(shape=(2**63, 2**63))]),
        "INVALID_ARGUMENT",
        "invalid",
        ("'t'", "shape"),
    ),
    "a huge product": (
        joining(model=[tensor(shape=(2**47,) * 64)]),
        "INVALID_ARGUMENT",
        "invalid",
        ("'t'", "shape"),
    ),
    "many dimensions": (
        joining(model=[tensor(shape=(2**20,) * 1_000_000)]),
        "INVALID_ARGUMENT",
        "invalid",
        ("'t'", "expected at most 64 dimensions"),
    ),
    "zero among the large": (
        joining(model=[tensor(shape=(2**63, 0))]),
        "INVALID_ARGUMENT",
        "invalid",
        ("'t'",),
    ),
    "many tensors": (
        joining(model=[pb.TensorSpec()] * 1_000_000),
        "INVALID_ARGUMENT",
        "invalid",
        ("1000000 tensors", "at most 262144"),
    ),
    "many valid tensors": (
        joining(model=[tensor(str(number)) for number in range(150_000)]),
        "FAILED_PRECONDITION",
        "model_differs",
        ("'a.weight' of the run is missing",),
    ),
    "no instance": (joining(instance=b""), "INVALID_ARGUMENT", "invalid", ("expected 16 bytes",)),
    "a long instance": (
        joining(instance=b"x" * 3_000_000),
        "INVALID_ARGUMENT",
        "invalid",
        ("instance", "expected 16 bytes"),
    ),
    "an epoch past all": (joining(epoch=2**64 - 1), "INVALID_ARGUMENT", "invalid", ("epoch=",)),
    "a number past all": (
        joining(next_sequence=2**63),
        "INVALID_ARGUMENT",
        "invalid",
        ("next_sequence=",),
    ),
    "an oldest past all": (
        joining(first_kept=2**63),
        "INVALID_ARGUMENT",
        "invalid",
        ("next_sequence=",),
    ),
    "no chain": (
        joining(point=pb.Point(version=2**63), run="x"),
        "INVALID_ARGUMENT",
        "invalid",
        ("0 bytes of chain",),
    ),
    "a long run": (
        joining(run="x" * 3_000_000, point=pb.Point(chain=bytes(32))),
        "FAILED_PRECONDITION",
        "wrong_run",
        ("'bob' belongs to run 'x",),
    ),
}

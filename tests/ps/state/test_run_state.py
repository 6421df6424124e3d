"""The answers of a run that is far ahead of a worker."""

from __future__ import annotations

import hashlib

import torch

from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.protocol.config import TrainingConfig
from topq_dist.ps.protocol.types import START, ModelVersion, Push, Update, UpdateKind
from topq_dist.ps.state.ledger import Ledger
from topq_dist.ps.state.run_state import RunState, new_run
from topq_dist.ps.wire.steps import answer_message

MESSAGE_BYTES = 4 << 20  # that a gRPC client takes, if not told otherwise


def test_an_answer_across_very_many_versions_fits_a_message() -> None:
    weight = torch.zeros(1 << 20)
    spec = ModelSpec.of([("weight", weight)])
    state = RunState.start(
        new_run(),
        TrainingConfig(inner_opt="sgd", options={"lr": 0.1}),
        spec,
        [weight.numpy().data.cast("B")],
        ledger=Ledger(),
        history_bytes=1 << 30,
    )
    payloads = (memoryview(bytes(32)),)
    for version in range(1, 100_001):  # of pushes without a gradient
        chain = hashlib.sha256(version.to_bytes(8, "little")).digest()
        state.point = ModelVersion(version=version, chain=chain)
        state.update_log.add(
            Update(kind=UpdateKind.SET, point=state.point, payloads=payloads), ("other",)
        )
    push = Push(worker="late", epoch=1, sequence=1, base=START, frames=(), lr=(), digest=bytes(32))
    header = answer_message(state.stale(push))
    assert header.ByteSize() < MESSAGE_BYTES
    assert state.stale(push).updates[-1].point == state.point

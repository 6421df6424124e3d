"""The answers of a run that is far ahead of a worker."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.protocol.config import TrainingConfig
from topq_dist.ps.protocol.errors import ExpiredError
from topq_dist.ps.protocol.types import START, ModelVersion, Push, Update, UpdateKind
from topq_dist.ps.state.ledger import Ledger
from topq_dist.ps.state.run_state import RunState, new_run
from topq_dist.ps.wire.steps import answer_message

MESSAGE_BYTES = 4 << 20  # that a gRPC client takes, if not told otherwise


def far_run(
    versions: int, payload_bytes: int, *, weight: torch.Tensor | None = None, **training: Any
) -> RunState:
    """Return a run of so many versions that others have made."""
    weight = torch.zeros(1 << 20) if weight is None else weight
    spec = ModelSpec.of([("weight", weight)])
    state = RunState.start(
        new_run(),
        TrainingConfig(inner_opt="sgd", options={"lr": 0.1}, **training),
        spec,
        [weight.numpy().data.cast("B")],
        ledger=Ledger(),
        history_bytes=1 << 30,
    )
    payloads = (memoryview(bytes(payload_bytes)),)
    for version in range(1, versions + 1):  # of pushes without a gradient
        chain = hashlib.sha256(version.to_bytes(8, "little")).digest()
        state.point = ModelVersion(version=version, chain=chain)
        state.update_log.add(
            Update(kind=UpdateKind.SET, point=state.point, payloads=payloads), ("other",)
        )
    return state


PUSH = Push(worker="late", epoch=1, sequence=1, base=START, frames=(), lr=(), digest=bytes(32))


def test_an_answer_across_very_many_versions_fits_a_message() -> None:
    state = far_run(100_000, 32)
    header = answer_message(state.stale(PUSH))
    assert header.ByteSize() < MESSAGE_BYTES
    assert state.stale(PUSH).updates[-1].point == state.point


def test_a_repeat_from_very_many_versions_before_is_refused() -> None:
    # the base of a push is no part of its digest: whoever repeats one may name any
    state = far_run(10_002, 32)
    with pytest.raises(ExpiredError, match="applied in version 10001, and the updates from vers"):
        state.repeat(PUSH, 10_001)
    answer = state.repeat(PUSH, 10_000)
    assert len(answer.updates) == 10_000
    assert answer_message(answer).ByteSize() < MESSAGE_BYTES


@pytest.mark.parametrize(
    ("training", "most_updates"), [({}, 2), ({"mode": "async", "max_staleness": 2}, 6)]
)
def test_a_repeat_is_of_no_more_bytes_than_its_first_answer_can_have_been(
    training: dict[str, Any], most_updates: int
) -> None:
    weight = torch.zeros(1000)
    largest = ModelSpec.of([("weight", weight)]).max_frame_bytes
    state = far_run(9, largest // 2, weight=weight, **training)
    assert len(state.repeat(PUSH, most_updates).updates) == most_updates
    with pytest.raises(ExpiredError, match="too many to be sent again"):
        state.repeat(PUSH, most_updates + 1)

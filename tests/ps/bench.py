"""A coordinator on a bench: calls without gRPC, a clock that the test moves, and crashes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from topq_dist.compress.codec.frame import Frame
from topq_dist.ps.model.flat import FlatModel
from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.protocol.config import ServingConfig, TrainingConfig
from topq_dist.ps.protocol.types import Answer, ModelVersion, Push, push_digest
from topq_dist.ps.server.coordinator import Coordinator
from topq_dist.ps.server.push_queue import PendingPush
from topq_dist.ps.server.requests import JoinCall, WorkerId
from topq_dist.ps.state.state_dir import StateDir

SPEC = ModelSpec.of([("w", torch.zeros(4))])


NEVER = 10**9


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds


def push_of(
    caller: WorkerId,
    sequence: int,
    base: ModelVersion,
    value: float = 1.0,
    *,
    replay: Answer | None = None,
) -> Push:
    values = torch.full((4,), value)
    frame = Frame(numel=4, indices=torch.arange(4), values=values.clone(), finite=True)
    return Push(
        worker=caller.worker,
        epoch=caller.epoch,
        sequence=sequence,
        base=base,
        frames=(frame,),
        lr=(),
        digest=push_digest((), [values.numpy().data.cast("B")]),
        applied_version=replay.applied.version if replay and replay.applied else 0,
        members=replay.members if replay else (),
    )


@dataclass
class Bench:
    """A coordinator that can crash and come back, and what its workers would say."""

    path: Path
    training: TrainingConfig
    serving: ServingConfig
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.state_dir = StateDir(self.path)
        self.server = Coordinator(self.training, self.serving, self.state_dir, clock=self.clock)

    def crash(self) -> None:
        """End without a drain: what is not durable is lost."""
        self.server._snapshotter.close()
        self.state_dir.close()
        self.restart()

    def save(self) -> None:
        self.server._snapshotter.save()

    def join(
        self,
        worker: str,
        *,
        instance: bytes | None = None,
        epoch: int = 0,
        held: ModelVersion | None = None,
        kept: tuple[int, int] | None = None,
        run: str | None = None,
        spec: ModelSpec = SPEC,
    ) -> WorkerId:
        """Join, and bring a model of zeros where told to; `kept` is (first, next) sequence."""
        joined = self.server.join(
            JoinCall(
                run=self.server.run if held is not None and run is None else run or "",
                worker=worker,
                instance=instance or worker.encode().ljust(16, b"."),
                epoch=epoch,
                next_sequence=0 if kept is None else kept[1],
                held=held,
                first_kept=0 if kept is None else kept[0],
                spec=spec,
            ),
            wait_s=0.05,
        )
        if joined.upload:
            self.server.upload(joined.caller, FlatModel(spec).raw())
        return joined.caller

    @property
    def point(self) -> ModelVersion:
        return self.server.status().point

    def submit(self, push: Push) -> PendingPush:
        caller = WorkerId(run=self.server.run, worker=push.worker, epoch=push.epoch)
        permit = self.server.permit(caller, push.sequence, push.digest)
        return self.server.submit(permit, push)

    def look(self, pending: PendingPush) -> Answer | tuple[str, ...]:
        return self.server.wait(pending, 0.0)

    def answer(self, pending: PendingPush) -> Answer:
        answer = self.look(pending)
        assert isinstance(answer, Answer), answer
        return answer

    def round(self, sequence: int, *callers: WorkerId, value: float = 1.0) -> list[Answer]:
        """Push for each worker on the present point, and return the answers."""
        base = self.point
        pendings = [self.submit(push_of(c, sequence, base, value)) for c in callers]
        return [self.answer(pending) for pending in pendings]

    def sha256(self) -> str:
        return self.server.status(state_sha256=True).state_sha256


Make = Callable[..., Bench]


def model_of(answer: Answer, held: FlatModel | None = None) -> Tensor:
    from topq_dist.ps.model.update import apply_update

    model = held or FlatModel(SPEC)
    for update in answer.updates:
        apply_update(model, update)
    return model.flats[0]

"""A run behind mutual TLS and tokens, which somebody acts against, and calls in a worker's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ps.strangers import CALL_S, Place, Worker
from ps_raw import Kept
from torch import Tensor

from topq_dist.ps.wire import codec
from topq_dist.v1 import parameter_server_pb2 as pb


@dataclass(kw_only=True)
class Run:
    """A server with a few versions behind it; `zombie` held alice's name before alice did."""

    place: Place
    alice: Worker
    zombie: Worker
    applied: list[Kept]

    def bob(self, named: dict[str, Tensor] | None = None) -> Worker:
        """Return a worker with a right to his name and no place in the run, who says he has."""
        bob = self.place.worker("bob", named)
        bob.id = pb.WorkerId(run=self.alice.id.run, worker="bob", epoch=1)
        bob.point = self.alice.point
        return bob

    def as_alice(self, token: str | None) -> Worker:
        """Return one who says that he is alice, and has `token`."""
        other = Worker("alice", self.place.channel(token))
        other.id, other.point = self.alice.id, self.alice.point
        other.sequence = self.alice.sequence
        return other

    def step(self) -> None:
        """Have alice step."""
        push = self.alice.next_push()
        answer = self.alice.send(push)
        assert answer.applied is not None
        self.alice.take(push, answer)
        self.applied.append(push)


Act = Callable[[Run], object]

CALLS: dict[str, Callable[[Worker], object]] = {
    "join": lambda worker: worker.join(),
    "upload": lambda worker: worker.stub.Upload(
        codec.upload_requests(worker.id, worker.held.raw()), timeout=CALL_S
    ),
    "step": lambda worker: worker.send(worker.next_push()),
    "short step": lambda worker: worker.stub.ShortStep(
        pb.ShortStepRequest(header=worker.header(worker.next_push())), timeout=CALL_S
    ),
    "fetch": lambda worker: worker.fetch(),
    "renew": lambda worker: worker.stub.Renew(pb.RenewRequest(id=worker.id), timeout=CALL_S),
    "leave": lambda worker: worker.stub.Leave(pb.LeaveRequest(id=worker.id), timeout=CALL_S),
}

"""One bit of a request changes on its way, in the clear: sent again, it does what it was to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from ps.client.test_optimizer import PLAIN, connect
from ps.servers import serving
from ps.workers import backward, batch, make_model

from topq_dist.ps.client.call_errors import refusal_of
from topq_dist.ps.client.server_client import ServerClient
from topq_dist.ps.protocol.errors import DamagedError
from topq_dist.ps.wire import messages, steps
from topq_dist.ps.wire.codec import spec_to_wire
from topq_dist.v1 import parameter_server_pb2 as pb

CALL_S = 20.0
# all take several seconds
EVERY_BIT = 3


def join_request(client: ServerClient) -> pb.JoinRequest:
    return pb.JoinRequest(
        run=client.run,
        worker=client.worker,
        instance=client._instance,
        epoch=client._id.epoch,
        next_sequence=client.pushes.unsent_sequence,
        point=messages.point_to_wire(client.point),
        first_kept=client.pushes.first_kept,
        model=spec_to_wire(client.model.spec),
    )


REQUESTS: dict[str, Callable[[ServerClient], Message]] = {
    "Join": join_request,
    "Renew": lambda client: pb.RenewRequest(id=client._id),
    "Fetch": lambda client: pb.FetchRequest(id=client._id, which=pb.FetchRequest.WHICH_CENTRAL),
}


def flips(raw: bytes) -> Iterator[bytes]:
    for bit in range(0, 8 * len(raw), EVERY_BIT):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


def reason(call: Callable[[], Any]) -> str:
    """Return why a call was refused; nothing where it was not."""
    try:
        call()
    except grpc.RpcError as error:
        refusal = refusal_of(error)
        return str(error) if refusal is None else refusal.reason
    return ""


def test_it_is_damaged_whatever_the_bit_says(tmp_path: Path) -> None:
    model = make_model()
    with (
        serving(tmp_path, PLAIN, lease_s=600, snapshot_every=100) as server,
        connect(model, server) as optimizer,
        grpc.insecure_channel(str(server.address)) as channel,
    ):
        backward(model, [batch(0, 0)])
        optimizer.step()
        (client,) = optimizer._clients

        def call(method: str, *requests: bytes) -> Any:
            made: Any = channel.stream_stream(f"/topq_dist.v1.ParameterServer/{method}")
            return list(made(iter(requests), timeout=CALL_S))

        for method, made in REQUESTS.items():
            raw = messages.with_checksum(made(client))
            found = Counter(reason(partial(call, method, one)) for one in flips(raw))
            # where the tag of the checksum is lost, the rest is whole
            assert found.keys() <= {"damaged", ""}, method
            assert found[""] < 4, method
        push = client.pushes._applied[0]
        header, *chunks = map(
            messages.STEP_REQUESTS.to_bytes, steps.step_requests(client._id, push)
        )
        found = Counter(reason(partial(call, "Step", one, *chunks)) for one in flips(header))
        assert found.keys() <= {"damaged", ""}
        status = server.coordinator.status()
        assert [worker.worker for worker in status.workers] == ["w0"]
        assert (list(status.refused), status.point.version) == (["damaged"], 1)


@pytest.mark.parametrize("method", REQUESTS)
def test_older_clients_say_no_checksum(tmp_path: Path, method: str) -> None:
    with (
        serving(tmp_path, PLAIN) as server,
        connect(make_model(), server) as optimizer,
        grpc.insecure_channel(str(server.address)) as channel,
    ):
        (client,) = optimizer._clients
        made: Any = channel.stream_stream(f"/topq_dist.v1.ParameterServer/{method}")
        old = REQUESTS[method](client).SerializeToString()
        assert reason(lambda: list(made(iter([old]), timeout=CALL_S))) == ""


def test_an_answer_says_a_checksum_as_well() -> None:
    raw = messages.with_checksum(pb.RenewResponse(durable_version=300))
    assert messages.from_checked(pb.RenewResponse, raw).durable_version == 300
    damaged = bytes([raw[0], raw[1] ^ 1, *raw[2:]])
    with pytest.raises(DamagedError, match="another checksum"):
        messages.from_checked(pb.RenewResponse, damaged)
    assert messages.from_checked(pb.RenewResponse, raw[:-5]).durable_version == 300

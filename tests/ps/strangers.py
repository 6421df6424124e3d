"""A server with mutual TLS and tokens, one honest worker in it, and ways to speak to it wrongly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import torch
from ps.certificates import Authority, Pair
from ps_raw import Kept, RawWorker
from served import Served, serving
from torch import Tensor

from topq_dist.ps.wire import steps
from topq_dist.ps.wire.messages import Calls
from topq_dist.v1 import parameter_server_pb2 as pb

CALL_S = 20.0
TOKENS = {name: name[0] * 32 for name in ("alice", "bob", "carol")}


def model() -> dict[str, Tensor]:
    """Return the run's model: two dtypes, so two vectors, of 10 and 3 elements."""
    torch.manual_seed(5)
    return {
        "a.weight": torch.randn(2, 3),
        "a.bias": torch.randn(4),
        "scale": torch.randn(3, dtype=torch.float64),
    }


def gradients(step: int) -> list[Tensor]:
    """Return a gradient for each vector."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(numel, generator=generator) for numel in (10, 3)]


class Worker(RawWorker):
    """A worker of bare stubs who speaks over `channel`."""

    def __init__(
        self, name: str, channel: grpc.Channel, named: dict[str, Tensor] | None = None
    ) -> None:
        super().__init__(name, model() if named is None else named, "127.0.0.1:1")
        self.channel.close()
        self.channel = channel
        self.stub = Calls(channel)

    def next_push(self) -> Kept:
        """Return a push that the server would take."""
        return self.push_of(gradients(self.sequence))

    def header(self, push: Kept, **changes: object) -> pb.StepHeader:
        """Return the header of `push`, with these fields changed."""
        header = steps.step_header(self.id, push.record())
        for name, value in changes.items():
            header.ClearField(name)  # type: ignore[arg-type]
            if isinstance(value, pb.WorkerId | pb.Point):
                getattr(header, name).CopyFrom(value)
            elif isinstance(value, list | tuple):
                getattr(header, name).extend(value)
            else:
                setattr(header, name, value)
        if "header_digest" not in changes:
            header.header_digest = steps.header_digest(header)
        return header

    def messages(
        self, push: Kept, lr: Sequence[float] = ()
    ) -> Iterator[pb.StepRequest | memoryview]:
        """Yield the messages of `push`."""
        return steps.step_requests(self.id, push.record(lr))

    def send_messages(
        self, messages: Iterable[pb.StepRequest | memoryview]
    ) -> list[pb.StepResponse]:
        """Send these messages as one step and return what comes back."""
        return list(self.stub.Step(iter(messages), timeout=CALL_S))


@dataclass(kw_only=True)
class Place:
    """A server that runs, and what it takes to get in. pair: of all honest clients."""

    served: Served
    ours: Authority
    foreign: Authority
    pair: Pair
    folder: Path
    channels: list[grpc.Channel]

    def __post_init__(self) -> None:
        self._operator = Calls(self.channel(TOKENS["carol"]))

    @property
    def port(self) -> int:
        """The address that it listens at."""
        return int(self.served.address.rpartition(":")[2])

    def channel(
        self, token: str | None, *, ca: Path | None = None, pair: Pair | None = None
    ) -> grpc.Channel:
        """Return a channel with `token` in each call, with our CA and certificate if not told."""
        shown = self.pair if pair is None else pair
        credentials = grpc.ssl_channel_credentials(
            (ca or self.ours.certificate).read_bytes(),
            shown.key.read_bytes(),
            shown.certificate.read_bytes(),
        )
        return self._open(credentials, token)

    def channel_without_certificate(self, token: str) -> grpc.Channel:
        """Return a channel of a client that has no certificate to show."""
        return self._open(grpc.ssl_channel_credentials(self.ours.certificate.read_bytes()), token)

    def _open(self, credentials: grpc.ChannelCredentials, token: str | None) -> grpc.Channel:
        if token is not None:
            credentials = grpc.composite_channel_credentials(
                credentials, grpc.access_token_call_credentials(token)
            )
        options = [("grpc.use_local_subchannel_pool", 1)]
        channel = grpc.secure_channel(f"localhost:{self.port}", credentials, options)
        self.channels.append(channel)
        return channel

    def worker(self, name: str, named: dict[str, Tensor] | None = None) -> Worker:
        """Return a worker that has a right to the name."""
        return Worker(name, self.channel(TOKENS[name]), named)

    def status(self) -> pb.StatusResponse:
        """Return the status, the state's hash included."""
        request = pb.StatusRequest(state_sha256=True)
        return self._operator.Status(request, timeout=CALL_S)


@contextmanager
def guarded(folder: Path, *words: str) -> Iterator[Place]:
    """Run `topq serve` with mutual TLS and a token for each of TOKENS."""
    ours, foreign = Authority(folder / "ours"), Authority(folder / "foreign", "foreign")
    server = ours.issue("server", server=True)
    tokens = folder / "tokens"
    tokens.touch(0o600)
    tokens.write_text("".join(f"{name} {token}\n" for name, token in TOKENS.items()))
    options = {
        "--address": "localhost:0",
        "--state-dir": str(folder / "state"),
        "--inner-opt": "adamw",
        "--lr": "0.01",
        "--tls-cert": str(server.certificate),
        "--tls-key": str(server.key),
        "--tls-client-ca": str(ours.certificate),
        "--tokens": str(tokens),
    }
    pair = ours.issue("client", server=False)
    with serving(*(word for option in options.items() for word in option), *words) as served:
        place = Place(
            served=served, ours=ours, foreign=foreign, pair=pair, folder=folder, channels=[]
        )
        try:
            yield place
        finally:
            for channel in place.channels:
                channel.close()

"""A run of `topq serve` that is attacked while two honest workers train, and what it comes to."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import grpc
import pytest
import torch
from ps.workers import backward, batch, make_model, side_by_side, values
from ps_raw import RawWorker
from served import Served
from server_process import quiet_port
from torch import Tensor

from topq_dist.ps import ParameterServerOptimizer
from topq_dist.ps.client.probe import ask_status
from topq_dist.ps.security.policy import ClientSecurity
from topq_dist.ps.security.tls import ClientTls
from topq_dist.v1 import parameter_server_pb2 as pb

STEPS = 12
# the step before which the attack is made, or begins
ATTACKED = 5
CALL_S = 60.0
_OPTIONS = ("--inner-opt", "adamw", "--inner-option", "weight_decay=0.1", "--lr", "0.01")
_DOWNLINK = ("--downlink", "topq", "--downlink-q", "0.9")


@dataclass
class Target:
    """A `topq serve` process on a port that it keeps when it is started again."""

    folder: Path
    words: Sequence[str] = ()
    tls: ClientTls | None = None
    tokens: bool = False
    port: int = field(default_factory=quiet_port)
    served: Served | None = None

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"127.0.0.1:{self.port}"

    @property
    def state_dir(self) -> Path:
        return self.folder / "state"

    def start(self, *, port: int | None = None) -> Served:
        """Start a process and wait until it listens."""
        # no more than these two come to a first version
        workers = [] if "--max-workers" in self.words else ["--workers", "2"]
        given = ["--address", f"127.0.0.1:{self.port if port is None else port}"]
        given += ["--state-dir", str(self.state_dir), "--snapshot-every", "2"]
        self.served = Served(*given, *_OPTIONS, *_DOWNLINK, *workers, *self.words)
        return self.served

    @property
    def pid(self) -> int:
        assert self.served is not None
        return self.served.pid

    def exit_code(self) -> int | None:
        """Return the process's exit code; None while it runs."""
        assert self.served is not None
        return self.served.exit_code

    def kill(self) -> None:
        """End the process as kill -9 does."""
        assert self.served is not None
        self.served.kill()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def memory_mb(self) -> int:
        """Return the resident memory."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) // 1024
        raise AssertionError("no VmRSS")

    def status(self) -> pb.StatusResponse:
        """Return the status, the state's hash included."""
        security = ClientSecurity(tls=self.tls, token=token_of("w0") if self.tokens else None)
        return ask_status(self.address, security, timeout_s=CALL_S, state_sha256=True)

    def __enter__(self) -> Self:
        if self.served is None:
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def token_of(name: str) -> str:
    """Return a worker's token."""
    return (name + "." * 32)[:32]


def train(
    target: Target,
    between: Callable[[int], None] = lambda step: None,
    last: Callable[[], None] = lambda: None,
) -> str:
    """Train as two workers, who end with the same; return the hash of the server's state.

    between: called before each step, by the first worker, for which the other waits. last: called
    when all steps are done, and both still there.
    """
    stand = threading.Barrier(2)

    def work(worker: int) -> Tensor:
        model = make_model()
        name = f"w{worker}"
        optimizer = ParameterServerOptimizer(
            model.named_parameters(),
            target.address,
            q=0.8,
            worker=name,
            timeout_s=CALL_S,
            tls=target.tls,
            token=token_of(name) if target.tokens else None,
        )
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(model, [batch(worker, step)])
            if worker == 0:
                between(step)
            optimizer.step()
        stand.wait(CALL_S)
        held = values(model)
        if worker == 0:
            hashes.append(target.status().state_sha256)
            last()
        stand.wait(CALL_S)
        optimizer.close()
        return held

    hashes: list[str] = []
    one, other = side_by_side(2, work, within_s=150)
    assert torch.equal(one, other)
    return hashes[0]


# ways to be a nuisance


def http2_frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return a frame of HTTP/2."""
    length = struct.pack(">I", len(payload))[1:]
    return length + bytes([kind, flags]) + struct.pack(">I", stream) + payload


HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + http2_frame(4, 0, 0, b"")
AGREED = http2_frame(4, 1, 0, b"")
_PIECE = 16_000


def endless_header(value_bytes: int, sent_bytes: int) -> bytes:
    """Return a header whose one value is of `value_bytes`, as far as `sent_bytes` of it."""
    length, rest = bytearray(b"\x7f"), value_bytes - 127
    while rest >= 128:
        length.append(rest & 127 | 128)
        rest >>= 7
    block = b"\x00\x01x" + bytes([*length, rest]) + b"a" * sent_bytes
    first, *others = (block[at : at + _PIECE] for at in range(0, len(block), _PIECE))
    continued = b"".join(http2_frame(9, 0, 1, piece) for piece in others)
    return http2_frame(1, 0, 1, first) + continued


@contextlib.contextmanager
def connections(target: Target, count: int, *said: bytes) -> Iterator[list[socket.socket]]:
    """Hold connections to the server that have said this and no more."""
    held: list[socket.socket] = []
    try:
        for number in range(count):
            end = socket.create_connection(("127.0.0.1", target.port), 10)
            end.settimeout(10)
            held.append(end)
            with contextlib.suppress(OSError):  # it may have hung up already
                end.sendall(said[number % len(said)] if said else b"")
        yield held
    finally:
        for end in held:
            end.close()


class Silence:
    """Calls that never say a word, opened again and again until the block ends."""

    def __init__(self, channel: grpc.Channel, method: str, count: int) -> None:
        self._open: Any = channel.stream_stream(method)
        self._over = threading.Event()
        self._calls = [self._open(self._nothing()) for _ in range(count)]
        self._thread = threading.Thread(target=self._again, daemon=True)
        self._thread.start()

    def _nothing(self) -> Iterator[bytes]:
        self._over.wait(CALL_S)
        yield from ()

    def _again(self) -> None:
        while not self._over.wait(0.05):
            over = [call for call in self._calls if not call.is_active()]
            for call in over[:50]:
                self._calls.remove(call)
                self._calls.append(self._open(self._nothing()))

    def end(self) -> None:
        self._over.set()
        self._thread.join(10)
        for call in self._calls:
            call.cancel()


def refusal(send: Callable[[], object]) -> str:
    """Return the status and the words of a call that is refused."""
    with pytest.raises(grpc.RpcError) as refused:
        send()
    assert isinstance(refused.value, grpc.Call)
    return f"{refused.value.code().name}: {refused.value.details()}"


def raw_worker(target: Target, name: str) -> RawWorker:
    """Return a worker of bare stubs with the run's model."""
    return RawWorker(name, dict(make_model().named_parameters()), target.address)


def pause(target: Target, seconds: float) -> None:
    """Stop the process for a while, as a paused container is."""
    target.signal(signal.SIGSTOP)
    time.sleep(seconds)
    target.signal(signal.SIGCONT)

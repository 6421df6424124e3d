"""A parameter server as a real process, and a worker of bare gRPC stubs, for tests of the server.

Server processes are forked from one that has imported torch, and neither grpc nor anything with
threads: each starts in a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Self

import grpc
import torch
from torch import Tensor

from topq_dist.compress.frame import encode_frame
from topq_dist.ps import wire
from topq_dist.ps.config import ServingConfig, TrainingConfig
from topq_dist.ps.downlink import apply_update
from topq_dist.ps.model import FlatModel, ModelSpec
from topq_dist.ps.protocol import START, Answer, Point, push_digest
from topq_dist.v1 import parameter_server_pb2 as pb
from topq_dist.v1 import parameter_server_pb2_grpc as pb_grpc

CALL_S = 30.0
# what a worker meets whose server has gone or come back
LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION)


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        return int(end.getsockname()[1])


class ServerProcess:
    """A server on one state directory and port; started, killed, started again."""

    def __init__(
        self,
        state_dir: Path,
        training: Mapping[str, Any],
        serving: Mapping[str, Any] | None = None,
        *,
        port: int | None = None,
    ) -> None:
        self.state_dir = state_dir
        self.port = port or free_port()
        self._log = state_dir.parent / f"{state_dir.name}.stderr"
        self._training, self._serving = dict(training), dict(serving or {})
        self._process: ForkServerProcess | None = None

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"127.0.0.1:{self.port}"

    @property
    def process(self) -> ForkServerProcess:
        """The process that was started last."""
        assert self._process is not None
        return self._process

    def launch(self, crash_at: str = "") -> None:
        """Start the process; it kills itself at the point `crash_at`."""
        context = multiprocessing.get_context("forkserver")
        # the second is what an optimizer imports when it is made
        context.set_forkserver_preload(["topq_dist.ps.run_state", "torch._dynamo"])
        arguments = (self.state_dir, self.port, self._training, self._serving, crash_at, self._log)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()

    def start(self, crash_at: str = "") -> None:
        """Start the process and wait until it answers."""
        self.launch(crash_at)
        end_s = time.monotonic() + CALL_S
        while time.monotonic() < end_s and self.process.is_alive():
            try:
                with grpc.insecure_channel(self.address) as channel:
                    pb_grpc.ParameterServerStub(channel).Status(pb.StatusRequest(), timeout=1)
                return
            except grpc.RpcError:
                time.sleep(0.02)
        raise AssertionError(f"the server did not start: {self.finish()}")

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send the process a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def finish(self, timeout_s: float = CALL_S) -> tuple[int, str]:
        """Wait for the process and return its exit status and what it wrote to stderr."""
        self.process.join(timeout_s)
        errors = self._log.read_text() if self._log.exists() else ""
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"the server did not end by itself: {errors}")
        return self.process.exitcode, errors

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.is_alive():
            self._process.kill()
            self._process.join()


@dataclass(kw_only=True)
class Kept:
    """A push as it was sent, and what became of it."""

    sequence: int
    base: Point
    frames: list[memoryview]
    digest: bytes
    applied_version: int = 0
    members: tuple[str, ...] = ()


@dataclass
class RawWorker:
    """Speaks for one worker through bare stubs; each method is one call, without a retry."""

    name: str
    model: dict[str, Tensor]
    address: str
    instance: bytes = field(default_factory=lambda: secrets.token_bytes(16))

    def __post_init__(self) -> None:
        self.spec = ModelSpec.of(self.model.items())
        self.held = FlatModel(self.spec)
        self.held.copy_from(self.model.items())
        self.id = pb.WorkerId(worker=self.name)
        self.point: Point | None = None
        self.sequence = 0
        self.kept: list[Kept] = []
        self.channel = grpc.insecure_channel(
            self.address, options=[("grpc.max_reconnect_backoff_ms", 200)]
        )
        self.stub = pb_grpc.ParameterServerStub(self.channel)

    def join(self) -> pb.JoinResponse:
        """Join, upload where told to, and fetch where nothing is held yet."""
        joined = self.stub.Join(
            pb.JoinRequest(
                run=self.id.run,
                worker=self.name,
                instance=self.instance,
                epoch=self.id.epoch,
                next_sequence=self.sequence,
                point=None if self.point is None else wire.point_to_wire(self.point),
                first_kept=self.kept[0].sequence if self.kept else 0,
                model=wire.spec_to_wire(self.spec),
            ),
            timeout=CALL_S,
            wait_for_ready=True,
        )
        self.id = joined.id
        if joined.upload:
            requests = wire.upload_requests(self.id, self.held.raw())
            self.stub.Upload(requests, timeout=CALL_S)
        if self.point is None:
            self.fetch()
            self.sequence = joined.next_sequence
        return joined

    def fetch(self) -> None:
        """Take the whole model."""
        request = pb.FetchRequest(id=self.id, which=pb.FetchRequest.WHICH_WORKERS)
        responses = self.stub.Fetch(request, timeout=CALL_S)
        self.point, _, vectors = wire.read_fetch(responses, self.spec)
        self.held.load_raw(vectors)

    def push_of(self, gradients: Sequence[Tensor]) -> Kept:
        """Return the next push, of dense gradients, one for each vector, or of none."""
        frames = []
        for gradient in gradients:
            frame, _ = encode_frame(gradient.numel(), torch.arange(gradient.numel()), gradient)
            frames.append(frame.numpy().data)
        return Kept(
            sequence=self.sequence,
            base=self.point or START,
            frames=frames,
            digest=push_digest((), frames),
        )

    def send(self, push: Kept, timeout_s: float = CALL_S) -> Answer:
        """Send a push and return the answer, without taking it."""
        requests = wire.step_requests(
            self.id,
            sequence=push.sequence,
            base=push.base,
            frames=push.frames,
            lr=(),
            digest=push.digest,
            applied_version=push.applied_version,
            members=push.members,
        )
        return wire.read_answer(self.stub.Step(requests, timeout=timeout_s), self.spec)

    def take(self, push: Kept, answer: Answer) -> None:
        """Do what an answer to a new push says."""
        if answer.applied is not None:
            self.sequence = push.sequence + 1
            push.applied_version, push.members = answer.applied.version, answer.members
            self.kept.append(push)
        for update in answer.updates:
            apply_update(self.held, update)
            self.point = update.point
        durable = answer.durable_version
        self.kept = [kept for kept in self.kept if kept.applied_version > durable]

    def step(self, gradients: Sequence[Tensor]) -> Answer:
        """Push, and take the answer."""
        push = self.push_of(gradients)
        answer = self.send(push)
        self.take(push, answer)
        return answer

    def come_back(self) -> None:
        """Join again after the server came back, and replay what it has lost."""
        joined = self.join()
        for push in list(self.kept):
            if push.sequence >= joined.next_sequence:
                answer = self.send(push)
                if answer.applied is None:
                    raise AssertionError(f"replay {push.sequence} of {self.name} was stale")

    def join_through(self, end_s: float) -> None:
        """Join, whatever happens to the server until `end_s`."""
        while self.point is None:
            try:
                self.join()
            except grpc.RpcError as error:
                refused = isinstance(error, grpc.Call) and error.code() in LOST
                if not refused or time.monotonic() > end_s:
                    raise
                time.sleep(0.02)

    def step_through(self, gradients: Sequence[Tensor], end_s: float) -> Answer:
        """Push until it is answered, whatever happens to the server until `end_s`."""
        push = self.push_of(gradients)
        while True:
            try:
                answer = self.send(push, timeout_s=max(0.1, end_s - time.monotonic()))
                break
            except grpc.RpcError as error:
                self._mend(error, end_s)
        self.take(push, answer)
        return answer

    def _mend(self, error: grpc.RpcError, end_s: float) -> None:
        while True:
            if not isinstance(error, grpc.Call) or time.monotonic() > end_s:
                raise error
            if error.code() not in LOST:
                raise error
            try:
                time.sleep(0.02)
                if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
                    self.come_back()
                return
            except grpc.RpcError as again:
                error = again
                time.sleep(0.02)

    def close(self) -> None:
        """Close the connection."""
        self.channel.close()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _crash_in(owner: Any, name: str, *, at_call: int, after: bool = False) -> None:
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def crashing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at_call and not after:
            _die()
        result = original(*arguments, **options)
        if calls == at_call:
            _die()
        return result

    setattr(owner, name, crashing)


def arm(crash_at: str) -> None:
    """Have this process kill itself at "POINT CALL": the CALL-th time that it comes to POINT."""
    from topq_dist.ps import snapshot, snapshot_file
    from topq_dist.ps.run_state import RunState

    point, call = crash_at.split()
    at_call = int(call)
    if point == "before-apply":
        _crash_in(RunState, "apply", at_call=at_call)
    elif point == "after-apply":
        _crash_in(RunState, "apply", at_call=at_call, after=True)
    elif point == "mid-write":
        _crash_in(snapshot_file, "_write", at_call=at_call, after=True)
    elif point == "mid-snapshot":
        _crash_in(os, "fsync", at_call=at_call)
    elif point == "before-rename":
        _crash_in(snapshot, "_rename", at_call=at_call)
    elif point == "after-rename":
        _crash_in(snapshot, "_rename", at_call=at_call, after=True)
    else:
        raise ValueError(f"crash_at={crash_at!r}: no such point")


def _serve(
    state_dir: Path,
    port: int,
    training: Mapping[str, Any],
    serving: Mapping[str, Any],
    crash_at: str,
    log: Path,
) -> None:
    from topq_dist.ps.server import serve

    errors = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(errors, 2)
    torch.set_num_threads(1)
    if crash_at:
        arm(crash_at)
    serve(
        TrainingConfig(**training),
        ServingConfig(**serving),
        state_dir=state_dir,
        address=f"127.0.0.1:{port}",
    )

"""Pushes that a server refuses by what is in them: how to send each, and what is said to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from ps.server.guarded_run import Act, Run
from ps.strangers import CALL_S

from topq_dist.compress.codec.frame import encode_frame, encode_non_finite_frame
from topq_dist.compress.codec.header import read_header, write_header
from topq_dist.compress.codec.values import quantize
from topq_dist.ps.protocol.types import push_digest
from topq_dist.ps.wire import steps
from topq_dist.v1 import parameter_server_pb2 as pb


class Pushed:
    """Sends alice's next push with some changes of its frames, its lr or header."""

    def __init__(self, **changes: Any) -> None:
        self._changes = changes

    def __call__(self, run: Run) -> None:
        header, chunks = self._push(run)
        run.alice.send_messages([pb.StepRequest(header=header), *chunks])

    def in_one_message(self, run: Run) -> None:
        """Do the same by ShortStep."""
        header, chunks = self._push(run)
        request = pb.ShortStepRequest(header=header, frames=b"".join(chunks))
        run.alice.stub.ShortStep(request, timeout=CALL_S)

    def _push(self, run: Run) -> tuple[pb.StepHeader, list[memoryview]]:
        changes = dict(self._changes)
        frames_of, lr = changes.pop("frames_of", None), changes.pop("lr", ())
        push = run.alice.next_push()
        if frames_of is not None:
            push = replace(push, frames=frames_of(push.frames))
        _, *chunks = run.alice.messages(push, lr)
        header = run.alice.header(push, lr=lr, digest=push_digest(lr, push.frames))
        for name, value in changes.items():
            set_field(header, name, value)
        header.header_digest = steps.header_digest(header)
        return header, [chunk for chunk in chunks if isinstance(chunk, memoryview)]


def set_field(header: pb.StepHeader, name: str, value: Any) -> None:
    header.ClearField(name)  # type: ignore[arg-type]
    if isinstance(value, list):
        getattr(header, name).extend(value)
    elif isinstance(value, pb.Point | pb.WorkerId):
        getattr(header, name).CopyFrom(value)
    else:
        setattr(header, name, value)


def altered(frames: list[memoryview]) -> list[memoryview]:
    damaged = bytearray(frames[0])
    damaged[-1] ^= 1
    return [memoryview(bytes(damaged)), *frames[1:]]


def of_numel(numel: int) -> list[memoryview]:
    frame = encode_frame(numel, torch.arange(numel), quantize(torch.ones(numel)))
    other = encode_frame(3, torch.arange(3), quantize(torch.ones(3)))
    return [frame.numpy().data, other.numpy().data]


def holding(value: float) -> list[memoryview]:
    frames = of_numel(10)
    frame = np.frombuffer(frames[0], dtype=np.uint8).copy()
    header = read_header(frame)
    frame[-4:] = np.array([value], dtype="<f4").view(np.uint8)
    write_header(header, frame)
    return [frame.data, frames[1]]


def truncated(run: Run) -> None:
    header, chunk = run.alice.messages(run.alice.next_push())
    assert isinstance(chunk, memoryview)
    run.alice.send_messages([header, chunk[:-1]])


def without_bytes(run: Run) -> None:
    header, _ = run.alice.messages(run.alice.next_push())
    run.alice.send_messages([header])


def too_many_bytes(run: Run) -> None:
    messages = run.alice.messages(run.alice.next_push())
    run.alice.send_messages([*messages, pb.StepRequest(chunk=b"x")])


def chunk_of(size: int) -> Act:
    def act(run: Run) -> None:
        header, _ = run.alice.messages(run.alice.next_push())
        run.alice.send_messages([header, pb.StepRequest(chunk=bytes(size))])

    return act


def empty_chunk(run: Run) -> None:
    header, chunk = run.alice.messages(run.alice.next_push())
    run.alice.send_messages([header, pb.StepRequest(chunk=b""), chunk])


def damaged_on_its_way(run: Run) -> None:
    header, chunk = run.alice.messages(run.alice.next_push())
    assert isinstance(chunk, memoryview)
    damaged = bytearray(chunk)
    damaged[40] ^= 4
    run.alice.send_messages([header, pb.StepRequest(chunk=bytes(damaged))])


def two_headers(run: Run) -> None:
    header, chunk = run.alice.messages(run.alice.next_push())
    run.alice.send_messages([header, header, chunk])


def chunk_first(run: Run) -> None:
    header, chunk = run.alice.messages(run.alice.next_push())
    run.alice.send_messages([chunk, header])


def nothing(run: Run) -> None:
    run.alice.send_messages([])


def empty_message(run: Run) -> None:
    run.alice.send_messages([pb.StepRequest()])


def non_finite(frames: list[memoryview]) -> list[memoryview]:
    return [encode_non_finite_frame(10).numpy().data, *frames[1:]]


def one_frame(frames: list[memoryview]) -> list[memoryview]:
    return frames[:1]


def empty_frame(frames: list[memoryview]) -> list[memoryview]:
    return [memoryview(b""), *frames[1:]]


BAD_PUSHES: dict[str, tuple[Act, str, str, tuple[str, ...]]] = {
    "declared beyond the limit": (
        Pushed(frame_bytes=[2**40, 1]),
        "RESOURCE_EXHAUSTED",
        "too_large",
        ("'alice'", str(2**40 + 1), "expected at most"),
    ),
    "declared beyond any number": (
        Pushed(frame_bytes=[2**64 - 1, 2**64 - 1]),
        "RESOURCE_EXHAUSTED",
        "too_large",
        ("expected at most",),
    ),
    "more bytes than declared": (too_many_bytes, "INVALID_ARGUMENT", "invalid", ("goes on after",)),
    "a long chunk": (chunk_of(3 << 20), "INVALID_ARGUMENT", "invalid", (str(3 << 20), "at most")),
    "fewer bytes": (truncated, "INVALID_ARGUMENT", "damaged", ("ended after", "of")),
    "no bytes": (without_bytes, "INVALID_ARGUMENT", "damaged", ("ended after 0 of",)),
    "damaged": (damaged_on_its_way, "INVALID_ARGUMENT", "damaged", ("damaged on its way",)),
    "altered": (Pushed(frames_of=altered), "INVALID_ARGUMENT", "invalid", ("frame 0", "checksum")),
    "wrong numel": (
        Pushed(frames_of=lambda _: of_numel(11)),
        "INVALID_ARGUMENT",
        "invalid",
        ("frame 0", "11 elements", "expected 10"),
    ),
    "one frame": (
        Pushed(frames_of=one_frame),
        "INVALID_ARGUMENT",
        "invalid",
        ("1 frames", "expected 2"),
    ),
    "an empty frame": (Pushed(frames_of=empty_frame), "INVALID_ARGUMENT", "invalid", ("frame 0",)),
    "many frames": (
        Pushed(frame_bytes=[0] * 1_000_000),
        "INVALID_ARGUMENT",
        "invalid",
        ("1000000 frames", "expected 2"),
    ),
    "non-finite": (Pushed(frames_of=non_finite), "INVALID_ARGUMENT", "non_finite", ("NaN",)),
    "NaN": (
        Pushed(frames_of=lambda _: holding(np.nan)),
        "INVALID_ARGUMENT",
        "invalid",
        ("finite",),
    ),
    "infinity": (
        Pushed(frames_of=lambda _: holding(np.inf)),
        "INVALID_ARGUMENT",
        "invalid",
        ("finite",),
    ),
    "lr NaN": (Pushed(lr=(float("nan"),)), "INVALID_ARGUMENT", "non_finite", ("lr=nan",)),
    "lr infinite": (Pushed(lr=(float("inf"),)), "INVALID_ARGUMENT", "non_finite", ("lr=inf",)),
    "lr below 0": (Pushed(lr=(-1.0,)), "INVALID_ARGUMENT", "invalid", ("lr=-1.0", "at least 0")),
    "two lrs": (Pushed(lr=(0.1, 0.1)), "INVALID_ARGUMENT", "invalid", ("2 learning rates",)),
    "many lrs": (
        Pushed(lr=(0.1,) * 400_000),
        "INVALID_ARGUMENT",
        "invalid",
        ("400000 learning rates",),
    ),
    "many NaN lrs": (
        Pushed(lr=(float("nan"),) * 400_000),
        "INVALID_ARGUMENT",
        "non_finite",
        ("lr=nan", "finite"),
    ),
    "coherence without its digest": (
        Pushed(coherence=[1.0, 1.0]),
        "INVALID_ARGUMENT",
        "damaged",
        ("another digest",),
    ),
    "other digest": (Pushed(digest=bytes(32)), "INVALID_ARGUMENT", "damaged", ("another digest",)),
    "short digest": (Pushed(digest=b"x"), "INVALID_ARGUMENT", "invalid", ("expected 32",)),
    "long digest": (Pushed(digest=b"x" * 3_000_000), "INVALID_ARGUMENT", "invalid", ("digest",)),
    "two headers": (two_headers, "INVALID_ARGUMENT", "damaged", ("two headers",)),
    "chunk first": (chunk_first, "INVALID_ARGUMENT", "damaged", ("without its header",)),
    "nothing": (nothing, "INVALID_ARGUMENT", "damaged", ("without its header",)),
    "empty message": (empty_message, "INVALID_ARGUMENT", "damaged", ("without its header",)),
    "a gap": (Pushed(sequence=1000), "OUT_OF_RANGE", "sequence_gap", ("'alice'", "expected push")),
    "the last number": (Pushed(sequence=2**64 - 1), "INVALID_ARGUMENT", "invalid", ("sequence=",)),
    "number 0": (Pushed(sequence=0), "INVALID_ARGUMENT", "invalid", ("sequence=0",)),
    "no chain": (
        Pushed(base=pb.Point(version=1, chain=b"x")),
        "INVALID_ARGUMENT",
        "invalid",
        ("1 bytes of chain", "expected 32"),
    ),
    "a base to come": (
        Pushed(base=pb.Point(version=2**63, chain=bytes(32))),
        "INVALID_ARGUMENT",
        "invalid",
        (f"based on version {2**63}", "expected at most"),
    ),
    "empty chunks": (empty_chunk, "INVALID_ARGUMENT", "invalid", ("an empty message",)),
    "a replay of nothing": (
        Pushed(applied_version=2**40, members=["alice"]),
        "INVALID_ARGUMENT",
        "invalid",
        ("applied in version", "lost nothing"),
    ),
    "a replay beside others": (
        Pushed(applied_version=5, members=["bob"]),
        "INVALID_ARGUMENT",
        "invalid",
        ("members=", "'alice'"),
    ),
    "a replay beside a crowd": (
        Pushed(applied_version=5, members=["bob"] * 400_000),
        "INVALID_ARGUMENT",
        "invalid",
        ("members",),
    ),
    "members that are no names": (
        Pushed(applied_version=5, members=["alice", "no/name"]),
        "INVALID_ARGUMENT",
        "invalid",
        ("worker='no/name'",),
    ),
}

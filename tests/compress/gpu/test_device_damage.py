"""Damaged frames in slots: refused on the device where the CPU refuses them, else read alike."""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from fuzz_frames import MUTATIONS, Seed, seal
from interpreted import DEVICE
from torch import Tensor

from topq_dist.compress.codec.frame import (
    Frame,
    FrameError,
    FrameHeader,
    decode_frame,
    encode_frame,
    encode_non_finite_frame,
    peek_header,
)
from topq_dist.compress.codec.segment_list import encode_ks
from topq_dist.compress.codec.values import VALUE_FORMATS, quantize
from topq_dist.compress.gpu import frames as device_frames
from topq_dist.compress.gpu.frames import HEAD_BYTES, check_frames, read_frames, slot_bytes
from topq_dist.compress.gpu.memory import Arena
from topq_dist.compress.gpu.shape import FORMATS, FrameShape
from topq_dist.exchange.slots import Head, write_head

ON = torch.device(DEVICE)
NOT_FINITE, DAMAGED = 1, 8
# numel and values of each segment: tiles, few low bits and none, entries of eight bytes, everything
SHAPES: list[tuple[int, list[int]]] = [
    (40, [2, 1, 3]),
    (3000, [150, 0, 131]),
    (90, [61]),
    (2**33, [3]),
    (7, [5, 2]),
    (9, [0]),
    (0, [0]),
]


def shape_of(numel: int, ks: Sequence[int], value_format: str) -> FrameShape:
    return FrameShape(numel=numel, ks=np.array(ks), value_format=value_format, device=ON)


def good_frame(shape: FrameShape, seed: int) -> bytes:
    generator = np.random.default_rng(seed)
    drawn: set[int] = set()
    while len(drawn) < shape.k:
        drawn.add(int(generator.integers(shape.numel)))
    values = torch.from_numpy(generator.standard_normal(shape.k).astype(np.float32))
    quantized = quantize(values, shape.value_format, segment_ks=shape.ks)
    indices = torch.tensor(sorted(drawn)).long()
    return encode_frame(shape.numel, indices, quantized, in_tiles=True).numpy().tobytes()


def other_segments(raw: bytearray, draw: random.Random, seeds: Sequence[Seed]) -> None:
    """Move some values from one segment of the list to another, or from one byte of it to two."""
    try:
        header = peek_header(bytes(raw))
    except FrameError:
        return
    start = header.header_bytes + header.index_bytes
    listed = raw[start : start + header.segment_bytes]
    if not listed:
        return
    at, to = draw.randrange(len(listed)), draw.randrange(len(listed))
    listed[at] = (listed[at] + 1) % 256
    listed[to] = (listed[to] - 1) % 256
    raw[start : start + header.segment_bytes] = listed


def other_directory(raw: bytearray, draw: random.Random, seeds: Sequence[Seed]) -> None:
    """Have a tile begin elsewhere."""
    at = draw.choice((32, 40)) + draw.randrange(24)
    if at < len(raw):
        raw[at] = (raw[at] + draw.choice((1, -1))) % 256


def other_exponent(raw: bytearray, draw: random.Random, seeds: Sequence[Seed]) -> None:
    raw[9:10] = bytes([draw.choice((0, 1, 112, 113, 114, 127, 128, 129, 130, 131, 255))])


def last_bits(raw: bytearray, draw: random.Random, seeds: Sequence[Seed]) -> None:
    """Set a bit at an end: of the frame, or of what lies before its values."""
    if len(raw) > 48:
        raw[draw.choice((-1, -1, -2, -9, -13, -17))] |= 1 << draw.randrange(4, 8)


OURS = [other_segments, other_directory, other_exponent, last_bits]


def damaged_in_many_ways(raw: bytes, shape: FrameShape, count: int, seed: int) -> list[bytes]:
    draw, seeds = random.Random(seed), [Seed(torch.tensor(list(raw), dtype=torch.uint8), 0)]
    seeds.append(Seed(encode_non_finite_frame(shape.numel, shape.value_format), 0))
    empty = encode_frame(
        shape.numel, torch.zeros(0, dtype=torch.int64), quantize(torch.zeros(0), shape.value_format)
    )
    seeds.append(Seed(empty, 0))
    mutants = [seed.raw for seed in seeds]
    while len(mutants) < count:
        mutant = bytearray(draw.choice((seeds[0], seeds[0], seeds[0], *seeds)).raw)
        for _ in range(draw.choice((1, 1, 1, 2))):
            if mutant:
                draw.choice(OURS if draw.random() < 0.5 else MUTATIONS)(mutant, draw, seeds)
        if draw.random() < 0.9:
            seal(mutant)
        mutants.append(bytes(mutant))
    return mutants


def flipped_bits(raw: bytes) -> list[bytes]:
    """Return the frame with each of its bits flipped, its checksum aside, which is made to fit."""
    mutants = []
    for at in [*range(28), *range(32, len(raw))]:
        for bit in range(8):
            mutant = bytearray(raw)
            mutant[at] ^= 1 << bit
            seal(mutant)
            mutants.append(bytes(mutant))
    return mutants


def read_on_device(mutants: Sequence[bytes], shape: FrameShape) -> tuple[Tensor, Tensor, Tensor]:
    """Return the report, indices and values of slots with these frames."""
    slots = torch.zeros(len(mutants), slot_bytes(shape), dtype=torch.uint8)
    for slot, mutant in zip(slots, mutants, strict=True):
        write_head(slot, Head(len(mutant), 5, False, False))
        held = np.frombuffer(mutant, np.uint8)[: slot.numel() - HEAD_BYTES]
        slot[HEAD_BYTES : HEAD_BYTES + held.size] = torch.from_numpy(held.copy())
    slots = slots.to(ON)
    report = torch.zeros(len(mutants), dtype=torch.int64, device=ON)
    with Arena().borrow(ON) as scratch:
        received = read_frames(slots, shape, check_frames(slots, shape, report), report, scratch)
    return report.cpu(), received.indices.cpu(), received.values.cpu()


def read_on_cpu(raw: bytes, shape: FrameShape) -> Frame | None:
    """Return the frame that decode_frame reads, None where it refuses or it is of another shape."""
    if len(raw) > slot_bytes(shape) - HEAD_BYTES:
        return None
    try:
        frame = decode_frame(raw, numel=shape.numel)
    except FrameError:
        return None
    return frame if is_of(shape, peek_header(raw), raw) else None


def is_of(shape: FrameShape, header: FrameHeader, raw: bytes) -> bool:
    if header.value_format != shape.value_format or header.k not in (0, shape.k):
        return False
    if header.k == 0:
        return True
    coding = header.index_coding.name, header.rice_bits
    if coding != (("TILED", shape.rice_bits) if shape.tiles else ("ALL", 0)):
        return False
    start = header.header_bytes + header.index_bytes
    ks = shape.ks[shape.ks > 0]
    wanted = encode_ks(ks).tobytes() if shape.listed.numel() else b""
    return raw[start : start + header.segment_bytes] == wanted


def compare(mutants: Sequence[bytes], shape: FrameShape) -> Counter[bool]:
    """Count what is accepted and refused; AssertionError where the device and the CPU differ."""
    report, indices, values = read_on_device(mutants, shape)
    outcomes: Counter[bool] = Counter()
    for raw, said, places, numbers in zip(mutants, report.tolist(), indices, values, strict=True):
        frame = read_on_cpu(raw, shape)
        outcomes[frame is not None] += 1
        assert bool(said & DAMAGED) == (frame is None), (shape, raw.hex())
        if frame is not None:
            assert said == (0 if frame.finite else NOT_FINITE), (shape, raw.hex())
            k = frame.values.numel()
            assert torch.equal(places[:k], frame.indices), (shape, raw.hex())
            # bits, since a zero may have a sign
            mine, wanted = numbers[:k].numpy(), frame.values.numpy()
            assert mine.tobytes() == wanted.tobytes(), (shape, raw.hex())
    return outcomes


@pytest.fixture(autouse=True)
def zlib_checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have zlib make the checksums: the interpreter takes nine tenths of its time for them.

    Others' tests run the kernel.
    """

    def summed_up(
        payload: Tensor, ranks: int, lengths: Tensor, stride: int, sums: Tensor, sums_stride: int
    ) -> None:
        each = lengths[:: device_frames._HEAD_NUMBERS]
        for rank, length in enumerate(each[:ranks].tolist()):
            raw = payload[rank * stride : rank * stride + length].numpy().tobytes()
            total = zlib.crc32(raw[32:], zlib.crc32(raw[:28]))
            sums[rank * sums_stride] = total - (total >> 31 << 32)

    if DEVICE == "cpu":
        monkeypatch.setattr(device_frames, "_sum_up", summed_up)


@pytest.mark.parametrize("value_format", FORMATS)
def test_what_the_cpu_refuses_is_refused(value_format: str) -> None:
    outcomes: Counter[bool] = Counter()
    for number, (numel, ks) in enumerate(SHAPES):
        shape = shape_of(numel, ks, value_format)
        seed = 10 * VALUE_FORMATS.index(value_format) + number
        mutants = damaged_in_many_ways(good_frame(shape, seed), shape, 16, seed)
        outcomes += compare(mutants, shape)
    assert min(outcomes[True], outcomes[False]) > 12, outcomes


@pytest.mark.parametrize(("numel", "ks", "value_format"), [(40, [2, 1, 3], "int2")])
def test_every_bit_of_a_frame(numel: int, ks: list[int], value_format: str) -> None:
    shape = shape_of(numel, ks, value_format)
    outcomes = compare(flipped_bits(good_frame(shape, 0)), shape)
    # other values, and other indices where the list is long enough for them
    assert min(outcomes[True], outcomes[False]) > 50, outcomes

"""Mutate good frames and decode them: python tests/fuzz_frames.py --cases 1000000.

Half of the mutants keep their stale checksum and must all be refused. The other half get one that
fits, as an attacker's would, and what is then accepted must be sound: k ascending indices in range,
finite values, and an index payload that is the only one for these indices and this header, as the
list of segments is for those.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from topq_dist.compress.codec import rice, tiled
from topq_dist.compress.codec.frame import (
    HEADER_BYTES,
    Frame,
    FrameError,
    FrameHeader,
    decode_frame,
    encode_frame,
    encode_non_finite_frame,
    peek_header,
)
from topq_dist.compress.codec.indices import IndexCoding, Indices
from topq_dist.compress.codec.segment_list import decode_ks, encode_ks
from topq_dist.compress.codec.values import BLOCK_NUMELS, CODED, VALUE_FORMATS, quantize

# numel, k: every index coding, and the small and odd sizes where edges lie
SHAPES = [(0, 0), (1, 0), (1, 1), (9, 9), (9, 4), (64, 3), (200, 90), (1000, 10), (5000, 300)]
SHAPES += [(2**31 - 1, 1), (2**33, 3), (100_000, 40)]


class Seed:
    """A good frame, and the number of elements that its receiver expects."""

    def __init__(self, frame: torch.Tensor, numel: int) -> None:
        self.raw = frame.numpy().tobytes()
        self.numel = numel


def make_seeds() -> list[Seed]:
    """Return one frame for each shape and value format, and one that is not finite.

    Frames of formats with blocks come with segments as well, where there can be any; those of every
    third shape in tiles, where they can.
    """
    generator = np.random.default_rng(0)
    seeds = [Seed(encode_non_finite_frame(9, "fp16"), 9)]
    for number, (numel, k) in enumerate(SHAPES):
        in_tiles = 0 < k < numel and number % 3 == 2
        for value_format in VALUE_FORMATS:
            drawn: set[int] = set()
            while len(drawn) < k:
                drawn.add(int(generator.integers(numel)))
            values = torch.from_numpy(generator.standard_normal(k).astype(np.float32))
            indices = torch.tensor(sorted(drawn)).long()
            frame = encode_frame(numel, indices, quantize(values, value_format), in_tiles=in_tiles)
            seeds.append(Seed(frame, numel))
            if value_format in BLOCK_NUMELS and k > 1:
                first = 1 + k // 2
                ks = [1] * k if k < 50 else [first, 0, 1, k - 1 - first]
                frame = encode_frame(numel, indices, quantize(values, value_format, segment_ks=ks))
                seeds.append(Seed(frame, numel))
    return seeds


def flip_bits(raw: bytearray, draw: random.Random, seeds: Sequence[Seed]) -> None:
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)


def set_bytes(raw: bytearray, draw: random.Random, seeds: Sequence[Seed]) -> None:
    for _ in range(draw.choice((1, 2, 4))):
        raw[draw.randrange(len(raw))] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))


def set_header_field(raw: bytearray, draw: random.Random, seeds: Sequence[Seed]) -> None:
    at, size = draw.choice(((5, 1), (6, 1), (7, 1), (8, 1), (9, 1), (12, 4), (16, 8), (24, 4)))
    if raw[5:6] == b"\2" and draw.random() < 0.5:
        at, size = draw.choice(((32, 4), (36, 4)))
    if raw[6:7] >= bytes([VALUE_FORMATS.index(CODED[0])]) and draw.random() < 0.3:
        at, size = (40 if raw[5:6] == b"\2" else 32), 4
    old = int.from_bytes(raw[at : at + size], "little")
    new = draw.choice((old + 1, old - 1, old * 2, old // 2, 0, -1, 1 << draw.randrange(64)))
    raw[at : at + size] = (new % (1 << (8 * size))).to_bytes(size, "little")


def cut_or_grow(raw: bytearray, draw: random.Random, seeds: Sequence[Seed]) -> None:
    if draw.random() < 0.5:
        del raw[draw.randrange(len(raw)) :]
    else:
        raw += draw.randbytes(draw.choice((1, 2, 8, 100)))


def move_bytes(raw: bytearray, draw: random.Random, seeds: Sequence[Seed]) -> None:
    start, stop = sorted(draw.randrange(len(raw) + 1) for _ in range(2))
    piece = bytes(raw[start:stop])
    if draw.random() < 0.5:
        del raw[start:stop]
    at = draw.randrange(len(raw) + 1)
    raw[at:at] = piece


def splice(raw: bytearray, draw: random.Random, seeds: Sequence[Seed]) -> None:
    other = draw.choice(seeds).raw
    at = draw.randrange(max(1, min(len(raw), len(other))))
    raw[at:] = other[at:]


MUTATIONS: list[Callable[[bytearray, random.Random, Sequence[Seed]], None]] = [
    flip_bits,
    set_bytes,
    set_header_field,
    set_header_field,
    cut_or_grow,
    move_bytes,
    splice,
]


def seal(raw: bytearray) -> None:
    if len(raw) >= HEADER_BYTES:
        crc = zlib.crc32(raw[HEADER_BYTES:], zlib.crc32(raw[:28]))
        raw[28:32] = crc.to_bytes(4, "little")


def check_sound(frame: Frame, raw: bytes, numel: int) -> None:
    """Raise AssertionError unless an accepted frame is one that could have been sent."""
    header = peek_header(raw)
    indices = frame.indices.numpy()
    sound = (
        frame.numel == header.numel == numel
        and indices.size == frame.values.numel() == header.k
        and (indices.size == 0 or (indices[0] >= 0 and indices[-1] < numel))
        and bool((np.diff(indices) > 0).all())
        and bool(np.isfinite(frame.values.numpy()).all())
        and frame.finite == header.finite
        and (frame.finite or header.k == 0)
    )
    if sound and indices.size:
        payloads = np.frombuffer(raw, np.uint8)[header.header_bytes :]
        payload, rest = payloads[: header.index_bytes], payloads[header.index_bytes :]
        sound = np.array_equal(payload, index_payload(indices, header))
        if header.segment_bytes:
            listed = rest[: header.segment_bytes]
            ks = decode_ks(listed, header.k)
            sound &= np.array_equal(encode_ks(ks), listed)
            sound &= header.blocks == sum(
                -(-int(one) // BLOCK_NUMELS[header.value_format]) for one in ks
            )
            sound &= len(ks) > 1 and min(ks) > 0 and sum(map(int, ks)) == header.k
    if not sound:
        raise AssertionError(f"accepted {raw.hex()}")


def index_payload(indices: Indices, header: FrameHeader) -> npt.NDArray[np.uint8]:
    """Return the bytes of these indices in the header's coding, written another way or by us."""
    match header.index_coding:
        case IndexCoding.ALL:
            return np.zeros(0, np.uint8)
        case IndexCoding.RAW:
            return indices.astype("<i4" if header.numel < 2**31 else "<i8").view(np.uint8)
        case IndexCoding.BITMAP:
            present = np.zeros(header.numel, np.uint8)
            present[indices] = 1
            return np.packbits(present, bitorder="little")
        case IndexCoding.RICE:
            return rice.encode_gaps(np.diff(indices, prepend=-1) - 1, header.rice_bits)
        case IndexCoding.TILED:
            gaps = np.diff(indices, prepend=-1) - 1
            code = rice.encode_gaps(gaps, header.rice_bits)
            ends = np.cumsum((gaps >> header.rice_bits) + 1)
            width = "<u4" if header.numel <= 2**32 else "<u8"
            entries = [
                [int(ends[at - 1]), int(indices[at - 1]) + 1] if at else [0, 0]
                for at in range(0, indices.size, tiled.TILE_NUMEL)
            ]
            return np.concatenate([np.array(entries, width).reshape(-1).view(np.uint8), code])


def fuzz(cases: int, seed: int) -> Counter[str]:
    """Decode `cases` mutants and count the outcomes; AssertionError at the first wrong one."""
    draw, seeds = random.Random(seed), make_seeds()
    # splicing can put a whole seed together again
    good = {known.raw for known in seeds}
    outcomes: Counter[str] = Counter()
    for _ in range(cases):
        chosen = draw.choice(seeds)
        raw = bytearray(chosen.raw)
        for _ in range(draw.choice((1, 1, 2, 3))):
            if raw:
                draw.choice(MUTATIONS)(raw, draw, seeds)
        resealed = draw.random() < 0.5
        if resealed:
            seal(raw)
        mutant = bytes(raw)
        padded = draw.random() < 0.2
        kind = "resealed" if resealed else "stale"
        started_s = time.perf_counter()
        try:
            frame = decode_frame(mutant, numel=chosen.numel, padded=padded)
        except FrameError:
            outcomes[f"{kind}, refused"] += 1
        else:
            length = peek_header(mutant).frame_bytes
            if len(mutant) > length and not padded:
                raise AssertionError(f"trailing bytes were accepted: {mutant.hex()}")
            check_sound(frame, mutant[:length], chosen.numel)
            changed = mutant[:length] not in good
            if changed and not resealed:
                raise AssertionError(f"a stale checksum was accepted: {mutant.hex()}")
            outcomes[f"{kind}, accepted" if changed else "unchanged"] += 1
        if time.perf_counter() - started_s > 5.0:
            raise AssertionError(f"took seconds: {mutant.hex()}")
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started_s = time.perf_counter()
    tracemalloc.start()
    outcomes = fuzz(arguments.cases, arguments.seed)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    for outcome, count in sorted(outcomes.items()):
        sys.stdout.write(f"{outcome:>20}: {count}\n")
    sys.stdout.write(
        f"{arguments.cases} mutants in {time.perf_counter() - started_s:.0f} s, "
        f"at most {peak_bytes / 1e6:.1f} MB at once, 0 wrong\n"
    )


if __name__ == "__main__":
    main()

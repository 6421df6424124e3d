"""Random vectors through the engine on a device and through the kernels on the CPU: the same bits.

    python tests/gpu_cases.py --vectors 5000

Sizes to 20,000, by their logarithms, in up to 24 segments, all dtypes, ties, denormals, zeros, NaN
and infinity, changes of scale between steps, with a residual and without. The tests run ten; this,
under Triton's interpreter, as many as it is told, and says how many it has compared.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace

import numpy as np
import torch
from interpreted import DEVICE  # before anything imports the kernels
from torch import Tensor

from topq_dist.compress.aggregate import write_sum
from topq_dist.compress.codec.frame import (
    Frame,
    decode_frame,
    encode_frame,
    encode_non_finite_frame,
)
from topq_dist.compress.codec.values import quantize
from topq_dist.compress.gpu.bounds import BoundTable
from topq_dist.compress.gpu.frames import check_frames, read_frames, slot_bytes, write_frame
from topq_dist.compress.gpu.memory import Arena
from topq_dist.compress.gpu.select import DeviceSelector
from topq_dist.compress.gpu.shape import FORMATS, FrameShape
from topq_dist.compress.gpu.update import DeviceSelected, finish
from topq_dist.compress.layout import ChunkedVector
from topq_dist.compress.sparsify.bounding import bounded
from topq_dist.compress.sparsify.segments import Segment, Segments, SegmentSelector
from topq_dist.dtypes import FLOATS, accumulate_dtype, key_of

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
KINDS = ["normal", "ties", "sparse", "denormal", "zero", "wide", "nan", "infinity"]


def drawn_segments(random: np.random.Generator, most: int) -> Segments:
    """Return segments that cover a vector of up to so many elements."""
    # few as a rule: each is a program of the interpreter at least
    count = int(random.integers(1, 25)) if random.random() < 0.1 else int(random.integers(1, 5))
    # as many small ones as large ones, of which each costs the interpreter a hundred times as much
    numel = round(most ** random.random())
    edges = np.sort(random.integers(0, numel + 1, count - 1))
    edges = np.concatenate([[0], edges, [numel]])
    segments = []
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        length = stop - start
        density = random.choice([0.001, 0.01, 0.1, 0.5, 1.0])
        k = 0 if random.random() < 0.1 else min(length, max(1, round(density * length)))
        segments.append(Segment(start=start, rows=1, row_numel=length, k=min(k, length)))
    return Segments(segments)


def drawn_vector(random: np.random.Generator, numel: int, dtype: torch.dtype, kind: str) -> Tensor:
    """Return a vector of one of KINDS."""
    numbers = random.standard_normal(numel)
    if kind == "ties":
        numbers = np.round(numbers)
    if kind == "sparse":
        numbers *= random.random(numel) < 0.01
    if kind == "denormal":
        numbers *= 1e-6 if dtype == torch.float16 else 1e-40
    if kind == "zero":
        numbers *= -0.0
    if kind == "wide":
        numbers *= 10.0 ** random.integers(-4, 4, numel)
    if kind in ("nan", "infinity"):
        numbers[random.integers(numel)] = np.nan if kind == "nan" else -np.inf
    return torch.from_numpy(numbers).to(dtype)


def drawn_format(random: np.random.Generator, dtype: torch.dtype) -> tuple[str, float | None]:
    """Return a value format, and a bound as often as not."""
    bound = float(random.choice([0.5, 1.0, 3.0])) if random.random() < 0.5 else None
    return str(random.choice([*FORMATS])), bound


class Rank:
    """One of the ranks of a case: the same vectors on the device and on the CPU.

    residual: of both, alike; None without error feedback.
    """

    def __init__(self, arena: Arena, residual: Tensor | None) -> None:
        self.on_device, self.on_cpu = DeviceSelector(arena), SegmentSelector()
        self.residual = residual
        self.left = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        self.device_residual = None if residual is None else residual.to(DEVICE, copy=True)

    def add(self, gradient: Tensor, segments: Segments, bound: float | None, fmt: str) -> Frame:
        """Return the frame that the CPU makes of a gradient, decoded, and make the residual's."""
        selected = self.on_cpu.select(ChunkedVector([gradient]), self.residual, segments)
        numel = gradient.numel()
        if not selected.finite:
            return decode_frame(encode_non_finite_frame(numel, fmt), numel=numel)
        sent = selected.values if bound is None else bounded(selected.values, segments, bound)
        quantized = quantize(sent, fmt, segment_ks=segments.table[:, 3])
        self.frame = encode_frame(numel, selected.indices, quantized, in_tiles=True)
        if self.residual is not None:
            self.left = selected.indices, torch.from_numpy(quantized.error(selected.values))
        return decode_frame(self.frame, numel=numel)

    def update(self, gradient: Tensor) -> None:
        """Take the gradient up, on the CPU."""
        if self.residual is not None:
            self.residual += gradient
            self.residual[self.left[0]] = self.left[1]


def check_step(
    ranks: list[Rank],
    gradients: list[Tensor],
    segments: Segments,
    fmt: str,
    bound: float | None,
    frame_bytes: int | None,
    arena: Arena,
) -> bool:
    """Compare a step of some ranks, each stage of it; return whether it counts."""
    numel, device = gradients[0].numel(), torch.device(DEVICE)
    shape = FrameShape(numel=numel, ks=segments.table[:, 3], value_format=fmt, device=device)
    table = None if bound is None else (BoundTable(segments, device), bound)
    slots = torch.zeros(
        len(ranks), slot_bytes(shape, frame_bytes), dtype=torch.uint8, device=device
    )
    report = torch.zeros(len(ranks), dtype=torch.int64, device=device)
    frames, selected, kept = [], [], []
    for rank, gradient, slot in zip(ranks, gradients, slots, strict=True):
        mine = gradient.to(device, copy=True)
        found = rank.on_device.select(mine, rank.device_residual, segments)
        frame = rank.add(gradient, segments, bound, fmt)
        with arena.borrow(device) as scratch:
            written = write_frame(
                found,
                shape,
                table,
                slot,
                scratch,
                has_residual=rank.residual is not None,
                settings_digest=0xFFFF0000,
                coherence=torch.zeros(2, dtype=torch.float64, device=device),
            )
        if frame.finite:
            same(found.indices, frame.indices, "indices")
        elif int(found.highest) < key_of(np.inf, found.values.dtype):
            raise AssertionError("taken for finite")
        sent = slot[32 : 32 + int(written.plan[2])].cpu()
        if int(written.plan[3]) == 2:
            # no room: all of it stays
            frame = replace(frame, indices=frame.indices[:0], values=frame.values[:0])
            rank.left = rank.left[0][:0], rank.left[1][:0]
        elif frame.finite and shape.k:
            same(sent, rank.frame, "bytes")
        read = decode_frame(sent, numel=numel)
        same(read.indices, frame.indices, "indices read")
        same(read.values, frame.values, "values read")
        frames.append(frame)
        selected.append(DeviceSelected(mine, rank.device_residual, found, shape, table))
        kept.append(written)
    finite = all(frame.finite for frame in frames)
    with arena.borrow(device) as scratch:
        heads = check_frames(slots, shape, report)
        received = read_frames(slots, shape, heads, report, scratch)
        if bool((report != 0).any()) == finite:
            raise AssertionError(f"report {report.tolist()} of frames that are finite={finite}")
        for number, frame in enumerate(frames):
            same(received.indices[number, : frame.indices.numel()], frame.indices, "indices")
            same(received.values[number, : frame.indices.numel()], frame.values, "values")
        for each, one in zip(selected, kept, strict=True):
            finish(each, one, received, report, scratch, divisor=len(ranks))
    average = torch.full_like(gradients[0], torch.nan)
    if finite:
        for rank, gradient in zip(ranks, gradients, strict=True):
            rank.update(gradient)
        write_sum(frames, divisor=len(ranks), out=average)
    for rank, each in zip(ranks, selected, strict=True):
        same(each.gradient, average, "average")
        if rank.residual is not None and rank.device_residual is not None:
            same(rank.device_residual, rank.residual, "residual")
    return finite


def same(found: Tensor, wanted: Tensor, what: str) -> None:
    """Raise AssertionError unless two tensors hold the same bits."""
    found = found.cpu()
    if found.dtype.is_floating_point and found.dtype == wanted.dtype:
        signed = FLOATS[found.dtype].signed
        found, wanted = found.contiguous().view(signed), wanted.contiguous().view(signed)
    if not torch.equal(found, wanted):
        raise AssertionError(f"other {what} than on the CPU")


def compare(vectors: int, seed: int, most: int = 20_000) -> int:
    """Compare so many vectors, in steps of one to three ranks; return how many steps counted.

    Raises AssertionError for the first difference.
    """
    random = np.random.default_rng(seed)
    arena, left, counted = Arena(), vectors, 0
    while left > 0:
        segments = drawn_segments(random, most)
        numel = segments[-1].where.stop
        dtype = DTYPES[int(random.integers(4))]
        has_residual = random.random() < 0.8
        fmt, bound = drawn_format(random, dtype)
        bound = bound if has_residual else None
        wide = accumulate_dtype(dtype)
        kept = [
            drawn_vector(random, numel, wide, "normal") * float(random.choice([0.0, 1e-30, 1.0]))
            for _ in range(int(random.integers(1, 4)))
        ]
        ranks = [Rank(arena, one if has_residual else None) for one in kept]
        for _ in range(int(random.integers(1, 4))):
            scale = float(random.choice([1.0, 1.0, 1.1, 1e-2, 40.0]))
            kinds = [
                str(random.choice(KINDS)) if random.random() < 0.5 else "normal" for _ in ranks
            ]
            gradients = [drawn_vector(random, numel, dtype, kind) * scale for kind in kinds]
            frame_bytes = int(random.integers(0, 400)) if random.random() < 0.1 else None
            counted += check_step(ranks, gradients, segments, fmt, bound, frame_bytes, arena)
            left -= len(ranks)
    return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started_s = time.perf_counter()
    counted = compare(options.vectors, options.seed)
    taken_s = time.perf_counter() - started_s
    sys.stdout.write(
        f"{options.vectors} vectors, {counted} steps that count, in {taken_s:.0f} s: all the same\n"
    )


if __name__ == "__main__":
    main()

"""Random vectors through the engine on a device and through the kernels on the CPU: the same bits.

    python tests/gpu_cases.py --vectors 5000

Sizes to 20,000 in up to 24 segments, all dtypes, ties, denormals, zeros, NaN and infinity, changes
of scale between steps. The tests run some hundred; this, under Triton's interpreter, as many as it
is told, and says how many it has compared.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import torch
from interpreted import DEVICE  # before anything imports the kernels
from torch import Tensor

from topq_dist.compress.gpu.memory import Arena
from topq_dist.compress.gpu.select import DeviceSelection, DeviceSelector
from topq_dist.compress.layout import ChunkedVector
from topq_dist.compress.sparsify.magnitude import Selection
from topq_dist.compress.sparsify.segments import Segment, Segments, SegmentSelector
from topq_dist.dtypes import FLOATS, accumulate_dtype, key_of

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
KINDS = ["normal", "ties", "sparse", "denormal", "zero", "wide", "nan", "infinity"]


def drawn_segments(random: np.random.Generator, most: int) -> Segments:
    """Return segments that cover a vector of up to so many elements."""
    # few as a rule: each is a program of the interpreter at least
    count = int(random.integers(1, 25)) if random.random() < 0.1 else int(random.integers(1, 5))
    numel = int(random.integers(1, most + 1))
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


def check_selection(found: DeviceSelection, wanted: Selection) -> None:
    """Raise AssertionError unless both hold the same bits, or say that a vector is not finite."""
    finite = int(found.highest) < key_of(np.inf, found.values.dtype)
    if finite != wanted.finite:
        raise AssertionError(f"finite={finite}: expected {wanted.finite}")
    if not finite:
        return
    if not torch.equal(found.indices.cpu(), wanted.indices):
        raise AssertionError("other indices than on the CPU")
    signed = FLOATS[wanted.values.dtype].signed
    if not torch.equal(found.values.cpu().view(signed), wanted.values.view(signed)):
        raise AssertionError("other values than on the CPU")


def compare(vectors: int, seed: int, most: int = 20_000) -> int:
    """Compare so many vectors; return how many were finite, or raise AssertionError."""
    random = np.random.default_rng(seed)
    arena, left, finite = Arena(), vectors, 0
    while left:
        segments = drawn_segments(random, most)
        numel = segments[-1].where.stop
        dtype = DTYPES[int(random.integers(4))]
        on_device, on_cpu = DeviceSelector(arena), SegmentSelector()
        has_residual = random.random() < 0.8
        for _ in range(min(left, int(random.integers(1, 5)))):
            left -= 1
            scale = float(random.choice([1.0, 1.0, 1.1, 1e-2, 40.0]))
            gradient = drawn_vector(random, numel, dtype, str(random.choice(KINDS))) * scale
            residual = None
            if has_residual:
                residual = drawn_vector(random, numel, accumulate_dtype(dtype), "normal")
                residual *= float(random.choice([0.0, 1e-30, 1.0]))
            found = on_device.select(
                gradient.to(DEVICE), None if residual is None else residual.to(DEVICE), segments
            )
            wanted = on_cpu.select(ChunkedVector([gradient]), residual, segments)
            check_selection(found, wanted)
            finite += wanted.finite
    return finite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started_s = time.perf_counter()
    finite = compare(options.vectors, options.seed)
    taken_s = time.perf_counter() - started_s
    sys.stdout.write(
        f"{options.vectors} vectors, {finite} of them finite, in {taken_s:.0f} s: all the same\n"
    )


if __name__ == "__main__":
    main()

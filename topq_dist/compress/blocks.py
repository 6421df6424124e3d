"""Passes over a flat CPU vector, block by block, so that each block is read from memory once.

A number's magnitude is its bit pattern with the sign cleared: as integers these keys order as the
magnitudes do, exactly, with infinity above every number, NaN above infinity and denormals whole.
"""

from __future__ import annotations

import threading
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from topq_dist.compress.workers import run_all, thread_count

# a block, its keys and its mask stay in a core's cache; below 65,536 call overhead shows
BLOCK_NUMEL = 131_072
# torch runs an elementwise operation of at most this many elements in the calling thread
_SERIAL_NUMEL = 32_768

Keys = npt.NDArray[np.unsignedinteger[Any]]
Indices = npt.NDArray[np.int64]

KEY_DTYPES: dict[torch.dtype, type[np.unsignedinteger[Any]]] = {
    torch.float16: np.uint16,
    torch.bfloat16: np.uint16,
    torch.float32: np.uint32,
    torch.float64: np.uint64,
}
_SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Candidates(NamedTuple):
    """Where a vector's magnitudes reach a threshold (ascending), and the bits of its numbers there.

    `complete` is False where there were more than the limit, and then only some are here.
    """

    indices: Indices
    bits: Keys
    complete: bool


def bits_of(vector: Tensor) -> Keys:
    """Return the bit patterns of a contiguous CPU float tensor, sharing its memory."""
    size = vector.dtype.itemsize
    return vector.detach().view(_SIGNED[size]).numpy().view(KEY_DTYPES[vector.dtype])


def number_of(key: int, dtype: torch.dtype) -> float:
    """Return the magnitude that a key stands for."""
    return float(torch.tensor([key], dtype=_SIGNED[dtype.itemsize]).view(dtype))


def magnitude_mask(dtype: torch.dtype) -> np.unsignedinteger[Any]:
    """Return the mask that clears the sign bit of a bit pattern."""
    return KEY_DTYPES[dtype]((1 << (dtype.itemsize * 8 - 1)) - 1)


def peak_magnitude(vector: Tensor) -> float:
    """Return the largest magnitude as a float: NaN or infinity where the vector holds either."""
    if not vector.numel():
        return 0.0
    bits = bits_of(vector)
    spans = _spans(bits.size)
    mask = int(magnitude_mask(vector.dtype))
    peak = max(run_all([partial(_peak_key, bits[start:stop], mask) for start, stop in spans]))
    return number_of(peak, vector.dtype)


def add_in_place(residual: Tensor, gradient: Tensor) -> None:
    """residual += gradient, where the gradient may be of half precision."""
    run_all([partial(_add_span, residual, gradient, *span) for span in _spans(residual.numel())])


def find_candidates(
    vector: Tensor, threshold: int, limit: int, *, gradient: Tensor | None = None
) -> Candidates:
    """Return where the vector's keys are at least `threshold`, adding `gradient` in on the way.

    The addition is always carried through; the search stops where it has found more than `limit`.
    """
    parts = run_all(
        [
            partial(_search_span, vector, threshold, limit, gradient, *span)
            for span in _spans(vector.numel())
        ]
    )
    found = [piece for part in parts for piece in part[0]]
    complete = all(part[1] for part in parts)
    if not found or not complete:
        nothing = np.zeros(0, dtype=KEY_DTYPES[vector.dtype])
        return Candidates(np.zeros(0, dtype=np.int64), nothing, complete)
    indices, bits = zip(*found, strict=True)
    return Candidates(np.concatenate(indices), np.concatenate(bits), complete=True)


class _Scratch(threading.local):
    """Kept buffers of one block, a set for each thread, shared by everything that runs in it."""

    def __init__(self) -> None:
        self._keys = np.empty(BLOCK_NUMEL, dtype=np.uint64)
        self.mask = np.empty(BLOCK_NUMEL, dtype=bool)
        self.single = torch.empty(BLOCK_NUMEL)

    def keys(self, dtype: torch.dtype) -> Keys:
        return self._keys.view(KEY_DTYPES[dtype])


_scratch = _Scratch()


def _spans(numel: int) -> list[tuple[int, int]]:
    blocks = -(-numel // BLOCK_NUMEL)
    parts = max(1, min(thread_count(), blocks))
    edges = [blocks * part // parts * BLOCK_NUMEL for part in range(parts + 1)]
    return [(start, min(stop, numel)) for start, stop in pairwise(edges)]


def _peak_key(bits: Keys, mask: int) -> int:
    # as signed integers the largest positive number is on top, as unsigned the most negative one:
    # two reductions, and no masked copy
    signed = bits.view(f"i{bits.itemsize}")
    peak = 0
    for start in range(0, bits.size, BLOCK_NUMEL):
        block = slice(start, start + BLOCK_NUMEL)
        peak = max(peak, int(signed[block].max()) & mask, int(bits[block].max()) & mask)
    return peak


def _add_block(residual: Tensor, gradient: Tensor) -> None:
    numel = residual.numel()
    if gradient.dtype == residual.dtype:
        total = residual.numpy()
        np.add(total, gradient.numpy(), out=total)
        return
    single = _scratch.single[:numel]
    for at in range(0, numel, _SERIAL_NUMEL):
        single[at : at + _SERIAL_NUMEL].copy_(gradient[at : at + _SERIAL_NUMEL])
    np.add(residual.numpy(), single.numpy(), out=residual.numpy())


def _add_span(residual: Tensor, gradient: Tensor, start: int, stop: int) -> None:
    for at in range(start, stop, BLOCK_NUMEL):
        end = min(at + BLOCK_NUMEL, stop)
        _add_block(residual[at:end], gradient[at:end])


def _search_span(
    vector: Tensor, threshold: int, limit: int, gradient: Tensor | None, start: int, stop: int
) -> tuple[list[tuple[Indices, Keys]], bool]:
    bits = bits_of(vector)
    clear_sign = magnitude_mask(vector.dtype)
    lowest = bits.dtype.type(threshold)
    keys, mask = _scratch.keys(vector.dtype), _scratch.mask
    found: list[tuple[Indices, Keys]] = []
    count = 0
    for at in range(start, stop, BLOCK_NUMEL):
        end = min(at + BLOCK_NUMEL, stop)
        if gradient is not None:
            _add_block(vector[at:end], gradient[at:end])
        if count > limit:
            if gradient is None:
                break
            continue
        block = bits[at:end]
        np.bitwise_and(block, clear_sign, out=keys[: end - at])
        np.greater_equal(keys[: end - at], lowest, out=mask[: end - at])
        indices = mask[: end - at].nonzero()[0]
        found.append((indices + at, block.take(indices, mode="clip")))
        count += indices.size
    return found, count <= limit

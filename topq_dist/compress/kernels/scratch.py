"""Blocks of long vectors, the slices that threads get of them, and each thread's scratch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from topq_dist.compress.kernels import STREAM_ALIGNMENT
from topq_dist.compress.kernels.threads import thread_count
from topq_dist.dtypes import FLOATS, Floats, Indices, Keys, cast, tensor_of

# a block stays in a core's cache; below 65,536 call overhead shows. What is written past the caches
# is aligned because whole blocks are many times STREAM_ALIGNMENT long
BLOCK_NUMEL = 262_144


def spans(count: int, unit: int) -> list[tuple[int, int]]:
    """Return range(count) in slices of whole units, as (start, stop), at most one a thread."""
    units = -(-count // unit)
    parts = max(1, min(thread_count(), units))
    edges = [units * part // parts * unit for part in range(parts + 1)]
    return [(start, min(stop, count)) for start, stop in pairwise(edges)]


def blocks(start: int, stop: int, numel: int = BLOCK_NUMEL) -> Iterator[tuple[int, int]]:
    """Yield range(start, stop) in blocks of `numel`, the last one shorter."""
    for at in range(start, stop, numel):
        yield at, min(at + numel, stop)


class _Scratch(threading.local):
    """Reusable buffers, a set for each thread, shared by everything that runs in it."""

    def __init__(self) -> None:
        self._block = np.empty(BLOCK_NUMEL, dtype=np.uint64)
        self._indices = np.zeros(0, dtype=np.int64)
        self._numbers = np.zeros(0, dtype=np.uint8)
        self._before = np.zeros(0, dtype=np.uint8)
        self._coding = np.zeros(0, dtype=np.uint8)
        self.single = torch.empty(BLOCK_NUMEL)
        # as many as stay in a core's first cache
        self.counts = np.empty(2_048, dtype=np.int64)

    def block(self, dtype: torch.dtype) -> Keys:
        """One block's keys."""
        return self._block.view(FLOATS[dtype].key)[:BLOCK_NUMEL]

    def listing(self, room: int, dtype: np.dtype[Any]) -> tuple[Indices, npt.NDArray[Any]]:
        """Room for so many indices, and numbers of a dtype."""
        if self._indices.size < room:
            self._indices = np.empty(room, dtype=np.int64)
        if self._numbers.nbytes < room * dtype.itemsize:
            self._numbers = np.empty(room * dtype.itemsize, dtype=np.uint8)
        return self._indices[:room], self._numbers[: room * dtype.itemsize].view(dtype)

    def coding(self, room: int) -> npt.NDArray[np.uint8]:
        """Room for so many bytes of code, until the next call."""
        if self._coding.size < room:
            self._coding = np.empty(room, dtype=np.uint8)
        return self._coding[:room]

    def before(self, numel: int, dtype: np.dtype[Any]) -> Floats:
        """Room for what a vector was: so many floats, of STREAM_ALIGNMENT, until the next call."""
        needed_bytes = numel * dtype.itemsize
        if self._before.nbytes < needed_bytes:
            # first, or there would be two of them for a while
            self._before = np.zeros(0, dtype=np.uint8)
            room = np.empty(needed_bytes + STREAM_ALIGNMENT, dtype=np.uint8)
            start = -room.ctypes.data % STREAM_ALIGNMENT
            self._before = room[start : start + needed_bytes]
        return self._before[:needed_bytes].view(dtype)


scratch = _Scratch()


def _widened(narrow: Tensor) -> Tensor:
    """Return half-precision numbers as fp32; of a block, in the calling thread's scratch."""
    numel = narrow.numel()
    return cast(narrow, torch.float32, out=scratch.single[:numel] if numel <= BLOCK_NUMEL else None)


def as_summand(bits: Keys, dtype: torch.dtype, wide: torch.dtype) -> Floats:
    """Return the numbers of bit patterns of `dtype` in `wide`; of a block, in scratch."""
    if dtype == wide:
        return bits.view(f"f{bits.itemsize}")
    return _widened(tensor_of(bits, dtype)).numpy()

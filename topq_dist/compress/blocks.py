"""gradient + residual as bit patterns, what they are added up in, and the scratch for it.

A number's magnitude is its bit pattern with the sign cleared: as integers these keys order as the
magnitudes do, exactly, with infinity above every number, NaN above infinity and denormals whole.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from topq_dist.compress.casts import cast
from topq_dist.compress.machine_code import STREAM_ALIGNMENT
from topq_dist.compress.workers import thread_count

# a block stays in a core's cache; below 65,536 call overhead shows. What is written past the caches
# is aligned because whole blocks are many times STREAM_ALIGNMENT long
BLOCK_NUMEL = 262_144

Keys = npt.NDArray[np.unsignedinteger[Any]]
Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating[Any]]

KEY_DTYPES: dict[torch.dtype, type[np.unsignedinteger[Any]]] = {
    torch.float16: np.uint16,
    torch.bfloat16: np.uint16,
    torch.float32: np.uint32,
    torch.float64: np.uint64,
}
SIGNED_DTYPES = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class CompensatedGradient:
    """gradient + residual, or the gradient alone, of which only what is looked at is added up.

    gradient, residual: 1-D, contiguous, on the CPU. `dtype` is the sum's: the residual's, or
    without one the gradient's. A sum may be infinite or NaN: see not_finite_allowed.
    """

    def __init__(self, gradient: Tensor, residual: Tensor | None) -> None:
        self.dtype = gradient.dtype if residual is None else residual.dtype
        self.numel = gradient.numel()
        self._gradient_dtype = gradient.dtype
        self._gradient_bits = bits_of(gradient)
        self._residual = None if residual is None else residual.detach().numpy()

    def keys(self, start: int, stop: int) -> Keys:
        """The magnitudes of one block: valid until the calling thread's next block."""
        keys = scratch.block(self.dtype)[: stop - start]
        bits = self._gradient_bits[start:stop]
        if self._residual is not None:
            owed = self._residual[start:stop]
            np.add(
                owed, as_summand(bits, self._gradient_dtype, self.dtype), out=keys.view(owed.dtype)
            )
            bits = keys
        np.bitwise_and(bits, sign_cleared(self.dtype), out=keys)
        return keys

    def stretch(self, start: int, stop: int) -> tuple[npt.NDArray[Any], Floats | None]:
        """What a kernel looks at: two floats of the sum's dtype, or integers and None.

        Where `gradient` is narrower than the sum, `stop - start` is at most BLOCK_NUMEL, and what
        is returned is valid until the calling thread's next block.
        """
        bits = self._gradient_bits[start:stop]
        if self._residual is None:
            return bits.view(f"i{bits.itemsize}"), None
        return as_summand(bits, self._gradient_dtype, self.dtype), self._residual[start:stop]

    @property
    def longest_stretch(self) -> int:
        """How many elements `stretch` can take."""
        whole = self._residual is None or self._gradient_dtype == self.dtype
        return max(1, self.numel) if whole else BLOCK_NUMEL

    def bits_at(self, where: Indices | slice) -> Keys:
        """The bit patterns at some indices, in memory of their own."""
        bits = _pick(self._gradient_bits, where)
        if self._residual is None:
            return bits
        return (
            _pick(self._residual, where) + as_summand(bits, self._gradient_dtype, self.dtype)
        ).view(KEY_DTYPES[self.dtype])


class TakenUp:
    """What a residual was, as far as a gradient has been added to it; undone by the same thread.

    There is one a thread at a time: it holds the thread's scratch.
    """

    def __init__(self, residual: Tensor) -> None:
        self._residual: Floats = residual.detach().numpy()
        self.before = scratch.before(self._residual.size, self._residual.dtype)
        self._added: list[tuple[int, Indices]] = []

    def begin(self, start: int) -> Indices:
        """Return where to count, from now on, how many elements from `start` on have been added."""
        added = np.zeros(1, np.int64)
        self._added.append((start, added))
        return added

    def undo(self) -> None:
        """Make the residual what it was."""
        for start, added in self._added:
            done = slice(start, start + int(added[0]))
            self._residual[done] = self.before[done]


def not_finite_allowed() -> np.errstate:
    """Return a context in which sums may be infinite or NaN; each thread needs its own."""
    return np.errstate(over="ignore", invalid="ignore")


def bits_of(vector: Tensor) -> Keys:
    """Return the bit patterns of a contiguous CPU float tensor, sharing its memory."""
    signed = vector.detach().view(SIGNED_DTYPES[vector.dtype.itemsize])
    return signed.numpy().view(KEY_DTYPES[vector.dtype])


def tensor_of(bits: Keys, dtype: torch.dtype) -> Tensor:
    """Return the numbers of these bit patterns, sharing their memory."""
    return torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(dtype)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what gradients of this dtype are added up in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sign_cleared(dtype: torch.dtype) -> np.unsignedinteger[Any]:
    """Return the mask that clears the sign bit of a bit pattern."""
    return KEY_DTYPES[dtype]((1 << (dtype.itemsize * 8 - 1)) - 1)


def number_of(key: int, dtype: torch.dtype) -> float:
    """Return the magnitude that a key stands for."""
    bits = np.uint64(key) if dtype == torch.float64 else np.uint32(key)
    if dtype == torch.float16:
        return float(np.uint16(key).view(np.float16))
    if dtype == torch.bfloat16:
        bits <<= np.uint32(16)
    return float(bits.view(f"f{bits.itemsize}"))


def key_of(magnitude: float, dtype: torch.dtype) -> int:
    """Return the key of a magnitude in this dtype; between two of bf16, the lower."""
    with np.errstate(over="ignore"):
        if dtype == torch.float64:
            return int(np.float64(magnitude).view(np.uint64))
        if dtype == torch.float16:
            return int(np.float16(magnitude).view(np.uint16))
        key = int(np.float32(magnitude).view(np.uint32))
    return key >> 16 if dtype == torch.bfloat16 else key


def spans(count: int, unit: int) -> list[tuple[int, int]]:
    """Return range(count) in contiguous stretches of whole units, one for each thread at most."""
    units = -(-count // unit)
    parts = max(1, min(thread_count(), units))
    edges = [units * part // parts * unit for part in range(parts + 1)]
    return [(start, min(stop, count)) for start, stop in pairwise(edges)]


def blocks(start: int, stop: int, numel: int = BLOCK_NUMEL) -> Iterator[tuple[int, int]]:
    """Yield range(start, stop) in blocks of `numel`, the last one shorter."""
    for at in range(start, stop, numel):
        yield at, min(at + numel, stop)


def check_vectors(gradient: Tensor, residual: Tensor | None) -> None:
    """Raise ValueError unless these are what Selector.select takes."""
    for name, vector in (("gradient", gradient), ("residual", residual)):
        if vector is not None and (
            vector.dim() != 1 or not vector.is_contiguous() or vector.dtype not in KEY_DTYPES
        ):
            raise ValueError(
                f"{name} has shape {tuple(vector.shape)} and dtype {vector.dtype}: expected one "
                f"contiguous dimension of one of {[*KEY_DTYPES]}"
            )
    if residual is None:
        return
    dtype = sum_dtype(gradient.dtype)
    expected = (gradient.shape, dtype, gradient.device)
    if (residual.shape, residual.dtype, residual.device) != expected:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}, dtype {residual.dtype} and device "
            f"{residual.device}: expected {tuple(gradient.shape)}, {dtype} and {gradient.device} "
            f"for a gradient of {gradient.dtype}"
        )


class _Scratch(threading.local):
    """Kept buffers, a set for each thread, shared by everything that runs in it."""

    def __init__(self) -> None:
        self._block = np.empty(BLOCK_NUMEL, dtype=np.uint64)
        self._indices = np.zeros(0, dtype=np.int64)
        self._numbers = np.zeros(0, dtype=np.uint8)
        self._before = np.zeros(0, dtype=np.uint8)
        self.single = torch.empty(BLOCK_NUMEL)
        # as many as stay in a core's first cache
        self.counts = np.empty(2_048, dtype=np.int64)

    def block(self, dtype: torch.dtype) -> Keys:
        """One block's keys."""
        return self._block.view(KEY_DTYPES[dtype])[:BLOCK_NUMEL]

    def listing(self, room: int, dtype: np.dtype[Any]) -> tuple[Indices, npt.NDArray[Any]]:
        """Room for so many indices, and numbers of a dtype."""
        if self._indices.size < room:
            self._indices = np.empty(room, dtype=np.int64)
        if self._numbers.nbytes < room * dtype.itemsize:
            self._numbers = np.empty(room * dtype.itemsize, dtype=np.uint8)
        return self._indices[:room], self._numbers[: room * dtype.itemsize].view(dtype)

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


def _pick(array: npt.NDArray[Any], where: Indices | slice) -> npt.NDArray[Any]:
    return array[where].copy() if isinstance(where, slice) else array.take(where, mode="clip")


def _widened(narrow: Tensor) -> Tensor:
    """Return half-precision numbers as fp32; of a block, in the calling thread's scratch."""
    numel = narrow.numel()
    return cast(narrow, torch.float32, out=scratch.single[:numel] if numel <= BLOCK_NUMEL else None)


def as_summand(bits: Keys, dtype: torch.dtype, wide: torch.dtype) -> Floats:
    """Return the numbers of bit patterns of `dtype` in `wide`; of a block, in kept scratch."""
    if dtype == wide:
        return bits.view(f"f{bits.itemsize}")
    return _widened(tensor_of(bits, dtype)).numpy()

"""gradient + residual as bit patterns, of which those of largest magnitude are selected."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from topq_dist.compress.kernels.scratch import BLOCK_NUMEL, as_summand, scratch
from topq_dist.dtypes import FLOATS, Floats, Indices, Keys, accumulate_dtype, bits_of, sign_cleared


class Selection(NamedTuple):
    """The k largest magnitudes: `indices` int64 ascending, `values` of the sum's dtype, both (k,).

    `finite` is False where the vector holds NaN or infinity anywhere.
    """

    indices: Tensor
    values: Tensor
    finite: bool


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
            residual = self._residual[start:stop]
            gradient = as_summand(bits, self._gradient_dtype, self.dtype)
            np.add(residual, gradient, out=keys.view(residual.dtype))
            bits = keys
        np.bitwise_and(bits, sign_cleared(self.dtype), out=keys)
        return keys

    def operands(self, start: int, stop: int) -> tuple[npt.NDArray[Any], Floats | None]:
        """What a kernel looks at: two floats of the sum's dtype, or integers and None.

        Where `gradient` is narrower than the sum, `stop - start` is at most BLOCK_NUMEL, and what
        is returned is valid until the calling thread's next block.
        """
        bits = self._gradient_bits[start:stop]
        if self._residual is None:
            return bits.view(f"i{bits.itemsize}"), None
        return as_summand(bits, self._gradient_dtype, self.dtype), self._residual[start:stop]

    @property
    def largest_slice(self) -> int:
        """How many elements `operands` can take."""
        whole = self._residual is None or self._gradient_dtype == self.dtype
        return max(1, self.numel) if whole else BLOCK_NUMEL

    def bits_at(self, where: Indices | slice) -> Keys:
        """The bit patterns at some indices, in memory of their own."""
        bits = _pick(self._gradient_bits, where)
        if self._residual is None:
            return bits
        return (
            _pick(self._residual, where) + as_summand(bits, self._gradient_dtype, self.dtype)
        ).view(FLOATS[self.dtype].key)


class UndoLog:
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


def check_vectors(gradient: Tensor, residual: Tensor | None) -> None:
    """Raise ValueError unless these are what Selector.select takes."""
    for name, vector in (("gradient", gradient), ("residual", residual)):
        if vector is not None and (
            vector.dim() != 1 or not vector.is_contiguous() or vector.dtype not in FLOATS
        ):
            raise ValueError(
                f"{name} has shape {tuple(vector.shape)} and dtype {vector.dtype}: expected one "
                f"contiguous dimension of one of {[*FLOATS]}"
            )
    if residual is None:
        return
    dtype = accumulate_dtype(gradient.dtype)
    expected = (gradient.shape, dtype, gradient.device)
    if (residual.shape, residual.dtype, residual.device) != expected:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}, dtype {residual.dtype} and device "
            f"{residual.device}: expected {tuple(gradient.shape)}, {dtype} and {gradient.device} "
            f"for a gradient of {gradient.dtype}"
        )


def _pick(array: npt.NDArray[Any], where: Indices | slice) -> npt.NDArray[Any]:
    return array[where].copy() if isinstance(where, slice) else array.take(where, mode="clip")

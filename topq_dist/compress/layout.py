"""Flat vectors of named tensors: what lies in them and where, and values that go with each."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from math import prod
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from torch import Tensor, strided

from topq_dist.compress.locks import ForkSafeLock
from topq_dist.compress.native import binding, library
from topq_dist.dtypes import Indices, bits_of

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which named tensors, in which order, make up a flat vector.

    strides: of each tensor the order of its elements in its slice, None being row after row; all
        are where this is empty. Layouts that differ in nothing else are equal: what is held for one
        (slots, thresholds) is held for the other.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...] | None, ...] = field(default=(), compare=False)

    def __hash__(self) -> int:
        # remembered, since it is asked for often, and takes a millisecond for 10,000 names
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.names, self.shapes))

    def __getstate__(self) -> dict[str, object]:
        # another process hashes strings otherwise
        strides = {"strides": self.strides} if self.strides else {}
        return {"names": self.names, "shapes": self.shapes, **strides}

    @cached_property
    def edges(self) -> Indices:
        """Where in the flat vector each of the tensors starts, and the last one ends."""
        return np.cumsum([0, *(prod(shape) for shape in self.shapes)], dtype=np.int64)

    @property
    def numel(self) -> int:
        """Elements in the flat vector."""
        return int(self.edges[-1])

    def slices(self) -> list[slice]:
        """Where in the flat vector each of the tensors lies."""
        return [slice(start, stop) for start, stop in pairwise(self.edges.tolist())]

    def tensors(self, flat: Tensor) -> list[Tensor]:
        """Return the tensors in `flat`, (numel,), by their shapes and as views."""
        strides = self.strides or (None,) * len(self.shapes)
        return [
            in_order(flat[where], shape, stride)
            for where, shape, stride in zip(self.slices(), self.shapes, strides, strict=True)
        ]


def in_order(flat: Tensor, shape: tuple[int, ...], strides: tuple[int, ...] | None) -> Tensor:
    """Return a view of a contiguous slice as a tensor of this shape and order of elements."""
    if strides is None:
        return flat.view(shape)
    return flat.as_strided(shape, strides, flat.storage_offset())


def memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Return the strides of a tensor without gaps whose elements do not lie row after row.

    None for all others: channels last and transposed ones have an order of their own. It is also
    that of their gradients in the buckets of DistributedDataParallel.
    """
    if tensor.is_contiguous():
        return None
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return None
        expected *= size
    return tuple(tensor.stride())


class OutOfRows(NamedTuple):
    """A slice of a flat vector that holds a tensor in memory's order, which is that of `strides`.

    Where its rows are looked at one by one, they must lie one behind the other for a while.
    """

    where: slice
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def to_rows(self, flat: Tensor) -> None:
        """Bring the slice of `flat` into the order of rows."""
        mine = flat[self.where]
        mine.copy_(in_order(mine, self.shape, self.strides).reshape(-1))

    def to_memory(self, flat: Tensor) -> None:
        """Bring it back into memory's order."""
        mine = flat[self.where]
        in_order(mine, self.shape, self.strides).copy_(mine.clone().view(self.shape))


class ChunkedVector:
    """Contiguous 1-D tensors, at least one, all of one dtype and device, read as one vector."""

    def __init__(self, chunks: Sequence[Tensor]) -> None:
        kinds = {(chunk.dtype, chunk.device) for chunk in chunks}
        if len(kinds) != 1:
            raise ValueError(f"chunks of {kinds}: expected one dtype and one device")
        self._chunks = list(chunks)
        self._edges = [0, *accumulate(chunk.numel() for chunk in chunks)]
        self.numel = self._edges[-1]
        ((self.dtype, self.device),) = kinds

    @property
    def whole(self) -> Tensor | None:
        """The vector, where it is one chunk."""
        return self._chunks[0] if len(self._chunks) == 1 else None

    def __getitem__(self, where: slice) -> Tensor:
        """Return a slice, which must lie in one chunk, sharing its memory."""
        number = min(bisect_right(self._edges, where.start), len(self._chunks)) - 1
        start = self._edges[number]
        if where.stop > self._edges[number + 1]:
            raise ValueError(f"{where}: expected a slice of one chunk")
        return self._chunks[number][where.start - start : where.stop - start]

    def pieces(self, where: slice) -> Iterator[Tensor]:
        """Yield what lies in a slice, chunk by chunk, sharing their memory."""
        for chunk, start in zip(self._chunks, self._edges, strict=False):
            low, high = max(where.start - start, 0), min(where.stop - start, chunk.numel())
            if low < high:
                yield chunk[low:high]

    def split(self, indices: Tensor) -> Iterator[tuple[slice, Tensor, slice]]:
        """Yield where each chunk lies, the chunk, and which of some ascending indices are in it."""
        edges = np.searchsorted(indices.numpy(), self._edges).tolist()
        slices = zip(pairwise(self._edges), pairwise(edges), strict=True)
        for chunk, ((start, stop), (low, high)) in zip(self._chunks, slices, strict=True):
            yield slice(start, stop), chunk, slice(low, high)


def gather_tensors(tensors: Sequence[Tensor | None], layout: Layout, out: Tensor) -> bool:
    """Copy the tensors of `layout` into `out`, (layout.numel,), in one call of compiled code.

    Returns False, having done nothing, where that cannot be: for tensors that are not there, not
    dense, contiguous and of out's dtype, or on another device than the CPU.
    """
    if library.LIBRARY is None or not out.is_cpu:
        return False
    dtype, numels = out.dtype, np.diff(layout.edges).tolist()
    addresses = [
        one.data_ptr()
        for one, numel in zip(tensors, numels, strict=True)
        if type(one) is Tensor
        and one.dtype is dtype
        and one.is_cpu
        and one.layout is strided
        and one.is_contiguous()
        and not one.is_neg()
        and one.numel() == numel
    ]
    if len(addresses) < len(numels):
        return False
    edges_bytes = layout.edges * dtype.itemsize
    binding.gather_tensors(np.array(addresses, np.int64), edges_bytes, bits_of(out))
    return True


# one for all, which can be pickled: something is made once a bucket, and hardly ever again
_MAKING = ForkSafeLock()


class LayoutCache(Generic[T]):
    """One value a layout, made when first asked for.

    Layouts that share a name never live at once: DDP has made its buckets anew, and what the old
    ones had is dropped.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._values: dict[Layout, T] = {}

    def of(self, layout: Layout) -> T:
        """Return the value of `layout`."""
        values = self._values
        if layout in values:
            return values[layout]
        with _MAKING:
            if layout not in self._values:
                names = set(layout.names)
                values = {
                    known: value
                    for known, value in self._values.items()
                    if names.isdisjoint(known.names)
                }
                # replaced, never changed: other threads may be reading it
                self._values = values | {layout: self._make()}
            return self._values[layout]

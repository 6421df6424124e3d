"""Flat vectors of named tensors: what lies in them, and where; what is kept of each."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import Generic, TypeVar

import numpy as np
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which named tensors, in which order, make up a flat vector."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def numel(self) -> int:
        """Elements in the flat vector."""
        return sum(prod(shape) for shape in self.shapes)

    def stretches(self) -> list[slice]:
        """Where in the flat vector each of the tensors lies."""
        edges = [0, *accumulate(prod(shape) for shape in self.shapes)]
        return [slice(start, stop) for start, stop in pairwise(edges)]


class Pieces:
    """Contiguous 1-D tensors, at least one, all of one dtype and device, read as one vector."""

    def __init__(self, pieces: Sequence[Tensor]) -> None:
        kinds = {(piece.dtype, piece.device) for piece in pieces}
        if len(kinds) != 1:
            raise ValueError(f"pieces of {kinds}: expected one dtype and one device")
        self._pieces = list(pieces)
        self._edges = [0, *accumulate(piece.numel() for piece in pieces)]
        self.numel = self._edges[-1]
        ((self.dtype, self.device),) = kinds

    @property
    def whole(self) -> Tensor | None:
        """The vector, where it lies in one piece."""
        return self._pieces[0] if len(self._pieces) == 1 else None

    def __getitem__(self, where: slice) -> Tensor:
        """Return a stretch, which must lie in one piece, sharing its memory."""
        number = min(bisect_right(self._edges, where.start), len(self._pieces)) - 1
        start = self._edges[number]
        if where.stop > self._edges[number + 1]:
            raise ValueError(f"{where}: expected a stretch of one piece")
        return self._pieces[number][where.start - start : where.stop - start]

    def shared_out(self, indices: Tensor) -> Iterator[tuple[slice, Tensor, slice]]:
        """Yield where each piece lies, the piece, and which of some ascending indices are in it."""
        edges = np.searchsorted(indices.numpy(), self._edges).tolist()
        stretches = zip(pairwise(self._edges), pairwise(edges), strict=True)
        for piece, ((start, stop), (low, high)) in zip(self._pieces, stretches, strict=True):
            yield slice(start, stop), piece, slice(low, high)


# one for all, which can be pickled: something is made once a bucket, and hardly ever again
_MAKING = threading.Lock()


class ByLayout(Generic[T]):
    """One value a layout, made when first asked for.

    Layouts that share a name never live at once: DDP has made its buckets anew, and what was kept
    for the old ones is dropped.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._kept: dict[Layout, T] = {}

    def of(self, layout: Layout) -> T:
        """Return what is kept for `layout`."""
        kept = self._kept
        if layout in kept:
            return kept[layout]
        with _MAKING:
            if layout not in self._kept:
                names = set(layout.names)
                kept = {
                    known: value
                    for known, value in self._kept.items()
                    if names.isdisjoint(known.names)
                }
                # replaced, never changed: other threads may be reading it
                self._kept = kept | {layout: self._make()}
            return self._kept[layout]

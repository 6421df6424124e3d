"""A flat vector that lies in memory in one piece or in several."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import numpy as np
from torch import Tensor


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

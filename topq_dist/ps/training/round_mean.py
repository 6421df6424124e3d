"""The mean gradient of a round, added up straight from the pushes' frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from topq_dist.compress.codec.frame import Frame
from topq_dist.compress.kernels.scratch import BLOCK_NUMEL, blocks
from topq_dist.compress.sparsify.magnitude import not_finite_allowed
from topq_dist.ps.model.flat import FlatModel, magnitude, picked, put, put_zeros, zeros
from topq_dist.ps.model.spec import ModelSpec

# with more nonzero elements than this share, a pass over the whole vector is cheaper than a
# scatter
_MOST_SCATTERED = 1 / 8


class GradientSum:
    """Flat gradients that are zero between rounds, in kept memory.

    model: the mean gradient after `add`, in the model's own dtypes.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.model = FlatModel(spec)
        # half precision would round once a frame
        self._totals = [
            flat if flat.dtype.itemsize > 2 else zeros(flat.numel(), torch.float32)
            for flat in self.model.flats
        ]
        self._indices: list[list[Tensor]] = []
        self._values: list[list[Tensor]] = []
        self._all_indices: dict[int, Tensor] = {}

    def add(self, pushes: Sequence[Sequence[Frame]]) -> None:
        """Add up the mean of the pushes, each of one frame for each vector, in their order."""
        self._all_indices = {}
        for total, frames in zip(self._totals, zip(*pushes, strict=True), strict=True):
            if all(_is_like(frame.values, total) for frame in frames):
                # the frames of a round share their indices; so do those of the next round then
                self._all_indices[total.numel()] = frames[0].indices
                _add_everywhere(total, [frame.values for frame in frames])
                continue
            for frame in frames:
                with not_finite_allowed():
                    values = torch.from_numpy(frame.values.numpy() / len(pushes))
                    replace(frame, values=values).add_to(total)
        self._indices, self._values = (
            [[getattr(frame, part) for frame in frames] for frames in zip(*pushes, strict=True)]
            for part in ("indices", "values")
        )
        for flat, total, indices in self._vectors():
            if total is not flat and self._scattered(flat, indices):
                for where in indices:
                    put(flat, where, picked(total, where).to(flat.dtype))
            elif total is not flat:
                flat.copy_(total)

    def magnitude(self) -> float:
        """Return what no element of the mean gradient exceeds."""
        looked_at: list[Tensor] = []
        for (flat, _, indices), values in zip(self._vectors(), self._values, strict=True):
            looked_at += values if self._scattered(flat, indices) else [flat]
        return max(map(magnitude, looked_at))

    def touched(self) -> list[Tensor] | None:
        """Return the ascending indices of each vector that are in any frame; None: too many."""
        unions = []
        for flat, _, indices in self._vectors():
            if not self._scattered(flat, indices):
                return None
            unions.append(_union(indices))
        return unions

    def clear(self) -> None:
        """Make the sum zero again."""
        for flat, total, indices in self._vectors():
            scattered = self._scattered(flat, indices)
            for vector in {id(flat): flat, id(total): total}.values():
                if scattered:
                    for where in indices:
                        put_zeros(vector, where)
                else:
                    vector.zero_()
        self._indices, self._values = [], []

    def _vectors(self) -> list[tuple[Tensor, Tensor, list[Tensor]]]:
        return list(zip(self.model.flats, self._totals, self._indices, strict=True))

    @staticmethod
    def _scattered(flat: Tensor, indices: Sequence[Tensor]) -> bool:
        return sum(where.numel() for where in indices) <= _MOST_SCATTERED * flat.numel()


def _is_like(values: Tensor, total: Tensor) -> bool:
    return values.numel() == total.numel() and values.dtype == total.dtype


def _add_everywhere(total: Tensor, terms: Sequence[Tensor]) -> None:
    """Add the mean of whole vectors to `total`, in their order, a block at a time."""
    sums, parts = total.numpy(), [term.numpy() for term in terms]
    share = np.empty(min(sums.size, BLOCK_NUMEL), dtype=sums.dtype)
    with not_finite_allowed():
        for start, stop in blocks(0, sums.size, BLOCK_NUMEL):
            for part in parts:
                np.divide(part[start:stop], len(parts), out=share[: stop - start])
                np.add(sums[start:stop], share[: stop - start], out=sums[start:stop])


def _union(indices: Sequence[Tensor]) -> Tensor:
    if len(indices) == 1:
        return indices[0]
    # ascending runs, which a merge sort merges
    merged = np.sort(np.concatenate([where.numpy() for where in indices]), kind="stable")
    first = np.ones(merged.size, dtype=bool)
    np.not_equal(merged[1:], merged[:-1], out=first[1:])
    return torch.from_numpy(merged[first])

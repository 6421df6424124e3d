"""Exact top-k by torch operations alone, for the devices that numpy cannot reach.

As on the CPU, last step's k-th magnitude is where the next search begins: one pass marks what
reaches a slightly lower threshold, and only those few are ranked. Source: the threshold that is
used again is Ok-Topk's (Li and Hoefler, "Near-Optimal Sparse Allreduce", PPoPP 2022).
"""

from __future__ import annotations

import torch
from torch import Tensor

from topq_dist.compress.sparsify.magnitude import Selection
from topq_dist.dtypes import FLOATS, key_of, number_of

# how far below last step's threshold to begin, and how many candidates are still few
_SLACK = 0.03
_MOST_OF_K = 4


def largest(keys: Tensor, k: int) -> Tensor:
    """Return where the k largest of each row lie, ascending; of equal ones, whichever torch takes.

    keys: (n,) or (N, n) of integers, on any device; the result is int64 of k columns.
    """
    return keys.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values


def select_with_torch(
    gradient: Tensor, k: int, *, residual: Tensor | None = None, row_numel: int | None = None
) -> Selection:
    """Do what Selector.select, or with `row_numel` select_rows, does, by torch on any device.

    Which of several equal magnitudes at the k-th place is selected is not specified.
    """
    vector, keys = _sum_and_keys(gradient, residual)
    rows = keys.view(1, -1) if row_numel is None else keys.view(-1, row_numel)
    within = largest(rows, k)
    starts = torch.arange(0, vector.numel(), max(1, rows.shape[1]), device=vector.device)
    indices = (within + starts[: rows.shape[0], None]).reshape(-1)
    finite = bool(torch.isfinite(vector).all())
    return Selection(indices, vector.index_select(0, indices), finite)


class DeviceSelector:
    """Selects from one named vector on any device, step after step."""

    def __init__(self) -> None:
        self._threshold: float | None = None

    def select(self, gradient: Tensor, k: int, residual: Tensor | None) -> Selection:
        """Return what Selector.select returns and takes, on the vector's device.

        Which of several equal magnitudes at the k-th place is selected is not specified.
        """
        vector, keys = _sum_and_keys(gradient, residual)
        dtype = vector.dtype
        infinite = key_of(float("inf"), dtype)
        indices = self._candidates(keys, k, dtype)
        if indices is None:
            indices = largest(keys, k)
            if k == 0:
                finite = vector.numel() == 0 or int(keys.max()) < infinite
                return Selection(indices, vector[:0], finite)
        elif indices.numel() > k:
            indices = indices[largest(keys[indices], k)]
        # NaN and infinity rank first, so they are among the selected
        lowest, highest = torch.stack(torch.aminmax(keys[indices])).tolist()
        finite = highest < infinite
        if finite:
            self._threshold = number_of(lowest, dtype)
        return Selection(indices, vector[indices], finite)

    def _candidates(self, keys: Tensor, k: int, dtype: torch.dtype) -> Tensor | None:
        """Return the indices, ascending, of k keys or more, and few; None where that fails."""
        if not self._threshold or k == 0:
            return None
        # not below the smallest number there is, or zeros would be candidates
        lowest = max(1, key_of(self._threshold * (1.0 - _SLACK), dtype))
        reached = keys >= lowest
        # counted first: to list a vector's every index takes twice its memory
        count = int(reached.sum())
        return reached.nonzero().view(-1) if k <= count <= _MOST_OF_K * k else None


def _sum_and_keys(gradient: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    vector = gradient.detach() if residual is None else residual.detach() + gradient.detach()
    signed = FLOATS[vector.dtype].signed
    return vector, vector.view(signed) & torch.iinfo(signed).max

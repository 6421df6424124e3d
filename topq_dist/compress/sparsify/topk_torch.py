"""Exact top-k by torch operations alone, for the devices that numpy cannot reach.

As on the CPU, last step's k-th magnitude is where the next search begins: one pass marks what
reaches a slightly lower threshold, and only those few are ranked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from topq_dist.dtypes import SIGNED_DTYPES, key_of, number_of

# how far below last step's threshold to begin, and how many candidates are still few
_SLACK = 0.03
_MOST_OF_K = 4


class DeviceSelector:
    """Selects from one named vector on any device, step after step."""

    def __init__(self) -> None:
        self._threshold: float | None = None

    def select(
        self, gradient: Tensor, k: int, residual: Tensor | None
    ) -> tuple[Tensor, Tensor, bool]:
        """Return (indices ascending, values, whether all is finite) of gradient + residual.

        What Selector.select returns and takes; which of several equal magnitudes at the k-th place
        is kept is not specified.
        """
        vector = gradient.detach() if residual is None else residual.detach() + gradient.detach()
        dtype = vector.dtype
        signed = SIGNED_DTYPES[dtype.itemsize]
        infinite = key_of(float("inf"), dtype)
        keys = vector.view(signed) & torch.iinfo(signed).max
        indices = self._candidates(keys, k, dtype)
        if indices is None:
            indices = keys.topk(k, sorted=False).indices.sort().values
            if k == 0:
                return indices, vector[:0], vector.numel() == 0 or int(keys.max()) < infinite
        elif indices.numel() > k:
            indices = indices[keys[indices].topk(k, sorted=False).indices.sort().values]
        # NaN and infinity rank first, so they are among the selected
        lowest, highest = torch.stack(torch.aminmax(keys[indices])).tolist()
        finite = highest < infinite
        if finite:
            self._threshold = number_of(lowest, dtype)
        return indices, vector[indices], finite

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

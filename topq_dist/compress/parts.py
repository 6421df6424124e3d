"""Dividing the index space of a vector evenly among ranks, whatever its hot spots."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from topq_dist.compress.part_kernels import deal_out, gather_back

# a prime, so that no row or column length deals a hot one to a single part
_DEALT_NUMEL = 509


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The elements of a vector dealt out to `count` parts, a block to each in turn."""

    numel: int
    count: int

    def numel_of(self, part: int) -> int:
        """Return how many elements a part has."""
        if self.count == 1:
            return self.numel
        rounds, rest = divmod(self.numel, _DEALT_NUMEL * self.count)
        return rounds * _DEALT_NUMEL + min(max(rest - part * _DEALT_NUMEL, 0), _DEALT_NUMEL)

    def deal(self, indices: Tensor) -> list[tuple[Tensor | slice, Tensor]]:
        """Return for each part where in `indices` its own are, and their places in the part.

        `indices` (int64, ascending, on the CPU) give places that ascend as well.
        """
        if self.count == 1:
            return [(slice(None), indices)]
        edges = np.zeros(self.count + 1, dtype=np.int64)
        mine, places = torch.empty_like(indices), torch.empty_like(indices)
        deal_out(indices.numpy(), _DEALT_NUMEL, edges, mine.numpy(), places.numpy())
        return [(mine[start:stop], places[start:stop]) for start, stop in pairwise(edges.tolist())]

    def gather(self, part: int, places: Tensor) -> Tensor:
        """Return the indices in the vector of these places in a part, both on the CPU."""
        if self.count == 1:
            return places
        indices = torch.empty_like(places)
        gather_back(places.numpy(), _DEALT_NUMEL, self.count, part, indices.numpy())
        return indices

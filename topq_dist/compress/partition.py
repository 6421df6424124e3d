"""A partition of the index space of a vector that is even, whatever its hot spots.

The loops divide once a block, not once an index.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from topq_dist.compress.kernels import indices_of_part, split_indices

# a prime, so that no row or column length puts hot ones into a single part
_BLOCK_NUMEL = 509


@dataclass(frozen=True, kw_only=True)
class BlockCyclicPartition:
    """`count` parts of a vector of `numel` elements, a block of it to each part in turn."""

    numel: int
    count: int

    def numel_of(self, part: int) -> int:
        """Return how many elements a part has."""
        if self.count == 1:
            return self.numel
        rounds, rest = divmod(self.numel, _BLOCK_NUMEL * self.count)
        return rounds * _BLOCK_NUMEL + min(max(rest - part * _BLOCK_NUMEL, 0), _BLOCK_NUMEL)

    def split(self, indices: Tensor) -> list[tuple[Tensor | slice, Tensor]]:
        """Return for each part where in `indices` its own are, and their places in the part.

        `indices` (int64, ascending, on the CPU) give places that ascend as well.
        """
        if self.count == 1:
            return [(slice(None), indices)]
        edges = np.zeros(self.count + 1, dtype=np.int64)
        mine, places = torch.empty_like(indices), torch.empty_like(indices)
        split_indices(indices.numpy(), _BLOCK_NUMEL, edges, mine.numpy(), places.numpy())
        return [(mine[start:stop], places[start:stop]) for start, stop in pairwise(edges.tolist())]

    def to_global(self, part: int, places: Tensor) -> Tensor:
        """Return the indices in the vector of these places in a part, both on the CPU."""
        if self.count == 1:
            return places
        indices = torch.empty_like(places)
        indices_of_part(places.numpy(), _BLOCK_NUMEL, self.count, part, indices.numpy())
        return indices

"""A partition of the index space of a vector that is even, whatever its hot spots.

The loops divide once a block, not once an index.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topq_dist.compress.kernels.jit import compiled
from topq_dist.compress.native import binding

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


@compiled
def split_indices(indices: Any, block_numel: Any, edges: Any, mine: Any, places: Any) -> None:
    """Sort indices by the part that their block belongs to, the blocks being the parts' in turn.

    indices: int64 (k,), ascending, none negative. block_numel: int, elements of a block.
    edges: int64 (parts + 1,), zeros at first; part p's lie from edges[p] to edges[p + 1] of the
        other two.
    mine: int64 (k,), where in `indices` they are. places: int64 (k,), where in the part they are.
    """
    count = edges.size - 1
    begin = owner = 0
    for at in range(indices.size):
        if np.uint64(indices[at] - begin) >= np.uint64(block_numel):
            block = indices[at] // block_numel
            begin, owner = block * block_numel, block % count
        edges[owner + 1] += 1
    for part in range(count):
        edges[part + 1] += edges[part]
    free = edges[:-1].copy()
    begin = owner = before = 0
    for at in range(indices.size):
        if np.uint64(indices[at] - begin) >= np.uint64(block_numel):
            block = indices[at] // block_numel
            begin, owner = block * block_numel, block % count
            before = begin - block // count * block_numel
        entry = free[owner]
        mine[entry] = at
        places[entry] = indices[at] - before
        free[owner] = entry + 1


@compiled
def indices_of_part(places: Any, block_numel: Any, count: Any, part: Any, indices: Any) -> None:
    """Write the indices in the vector of these places in one of `count` parts.

    places: int64 (k,), ascending. block_numel, count, part: int. indices: int64 (k,).
    """
    begin, before = 0, part * block_numel
    for at in range(places.size):
        if np.uint64(places[at] - begin) >= np.uint64(block_numel):
            rounds = places[at] // block_numel
            begin, before = rounds * block_numel, (rounds * (count - 1) + part) * block_numel
        indices[at] = places[at] + before


# where the library is there; else numba's stay
globals().update(binding.kernels("split_indices", "indices_of_part"))

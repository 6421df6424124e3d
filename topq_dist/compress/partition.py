"""Dividing the index space of a vector evenly among ranks, whatever its hot spots."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from topq_dist.compress.kernels.jit import compiled

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


@compiled
def deal_out(indices: Any, block_numel: Any, edges: Any, mine: Any, places: Any) -> None:
    """Sort indices by the part that their block of `block_numel` belongs to, in turn.

    Part p's lie from edges[p] to edges[p + 1]: where in `indices` they are in `mine`, and where in
    the part in `places`. `edges` begins as zeros, one more than there are parts.
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
def gather_back(places: Any, block_numel: Any, count: Any, part: Any, indices: Any) -> None:
    """Write the indices in the vector of these places in one of `count` parts."""
    begin, before = 0, part * block_numel
    for at in range(places.size):
        if np.uint64(places[at] - begin) >= np.uint64(block_numel):
            rounds = places[at] // block_numel
            begin, before = rounds * block_numel, (rounds * (count - 1) + part) * block_numel
        indices[at] = places[at] + before

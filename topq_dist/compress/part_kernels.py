"""Dealing indices out to parts, and back, in compiled loops that divide once a block."""

from __future__ import annotations

from typing import Any

import numpy as np

from topq_dist.compress.machine_code import compiled


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

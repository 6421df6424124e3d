"""The tree by which a segment's magnitudes are summed, see kernels/bounds.py."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from topq_dist.compress.codec.lowbit import BLOCK_NUMEL, Counts
from topq_dist.compress.gpu.memory import to_device
from topq_dist.compress.sparsify.segments import Segments

_LANES = 8


class BoundTable:
    """Leaves and trees of the rows of `segments`, on a device."""

    def __init__(self, segments: Segments, device: torch.device) -> None:
        _, _, numels, ks = segments.table.T
        first = np.cumsum(ks) - ks
        leaves, trees, nodes = [], [], 0
        shapes: dict[int, tuple[Counts, int]] = {}
        for segment, (k, numel) in enumerate(zip(ks.tolist(), numels.tolist(), strict=True)):
            if k not in shapes:
                shapes[k] = _leaves_of(max(0, k - 1))
            mine, levels = shapes[k]
            # the first value is added last, apart
            columns = mine[:, 0] + first[segment] + 1, mine[:, 1], mine[:, 2] + nodes
            leaves.append(np.stack([*columns, np.full(len(mine), segment)], axis=1))
            trees.append((nodes, levels, first[segment], k, 2 * k < numel))
            nodes += 2 << levels
        self.leaf_count = sum(map(len, leaves))
        self.node_count = nodes
        self.leaves = _table(np.concatenate(leaves), device)
        self.trees = _table(np.array(trees), device)
        # places without a leaf stay zero
        self.nodes = torch.zeros(nodes, dtype=torch.float64, device=device)
        self.limits = torch.zeros(len(trees), dtype=torch.float64, device=device)


def _leaves_of(count: int) -> tuple[Counts, int]:
    """Return first value, size and node of each leaf of so many values, and the tree's levels."""
    found = [(0, count, 1, 0)] if count else []
    split = True
    while split:
        split, halved = False, []
        for start, size, node, level in found:
            if size <= BLOCK_NUMEL:
                halved.append((start, size, node, level))
                continue
            half = size // 2 - size // 2 % _LANES
            halved.append((start, half, 2 * node, level + 1))
            halved.append((start + half, size - half, 2 * node + 1, level + 1))
            split = True
        found = halved
    levels = max((level for *_, level in found), default=0)
    # a leaf above the lowest level is the sum of itself and of nothing
    placed = [(start, size, node << (levels - level)) for start, size, node, level in found]
    return np.array(placed, np.int64).reshape(-1, 3), levels


def _table(rows: Counts, device: torch.device) -> Tensor:
    return to_device(torch.from_numpy(rows.astype(np.int64).copy()), device)

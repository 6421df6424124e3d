"""A partition of the index space of a vector that is even, whatever its hot spots.

The loops divide once a block, not once an index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from topq_dist.compress.kernels import indices_of_part, split_indices
from topq_dist.dtypes import Floats, Indices, bits_of, tensor_of

# a prime, so that no row or column length puts hot ones into a single part
_BLOCK_NUMEL = 509


class SplitIndices(NamedTuple):
    """Indices of a vector, those of each part together.

    order: where each stood before; None where there is one part, and all stand where they did.
    places: where they are in their part, ascending in each. parts: which of them each part has.
    """

    order: Indices | None
    places: Tensor
    parts: list[slice]

    def sort(self, values: Tensor) -> Tensor:
        """Return the values of the indices, on the CPU, in this order."""
        if self.order is None:
            return values
        # numpy, since torch takes several times as long to pick single elements
        return tensor_of(bits_of(values).take(self.order), values.dtype)

    def unsort(self, parts: Sequence[Floats]) -> Floats:
        """Return in the order of before what is given part by part."""
        if self.order is None:
            return parts[0]
        sorted_ = np.concatenate(parts)
        values = np.empty_like(sorted_)
        values[self.order] = sorted_
        return values


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

    def split(self, indices: Tensor) -> SplitIndices:
        """Return `indices`, int64, ascending and on the CPU, part by part."""
        if self.count == 1:
            return SplitIndices(None, indices, [slice(0, indices.numel())])
        edges = np.zeros(self.count + 1, dtype=np.int64)
        order, places = torch.empty_like(indices).numpy(), torch.empty_like(indices)
        split_indices(indices.numpy(), _BLOCK_NUMEL, edges, order, places.numpy())
        parts = [slice(*edge) for edge in pairwise(edges.tolist())]
        return SplitIndices(order, places, parts)

    def to_global(self, part: int, places: Tensor) -> Tensor:
        """Return the indices in the vector of these places in a part, both on the CPU."""
        if self.count == 1:
            return places
        indices = torch.empty_like(places)
        indices_of_part(places.numpy(), _BLOCK_NUMEL, self.count, part, indices.numpy())
        return indices

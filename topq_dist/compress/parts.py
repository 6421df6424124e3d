"""Dividing the index space of a vector evenly among ranks, whatever its hot spots."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
        block = indices.numpy() // _DEALT_NUMEL
        owner = block % self.count
        place = indices.numpy() - (block - block // self.count) * _DEALT_NUMEL
        # numpy sorts short integers stably by radix, in one pass or two
        short = np.uint8 if self.count <= 1 << 8 else np.uint16 if self.count <= 1 << 16 else None
        order = np.argsort(owner if short is None else owner.astype(short), kind="stable")
        edges = np.bincount(owner, minlength=self.count).cumsum()[:-1]
        return [
            (torch.from_numpy(mine), torch.from_numpy(places))
            for mine, places in zip(
                np.split(order, edges), np.split(place.take(order), edges), strict=True
            )
        ]

    def gather(self, part: int, places: Tensor) -> Tensor:
        """Return the indices in the vector of these places in a part, both on the CPU."""
        if self.count == 1:
            return places
        # numpy divides by one number for all many times as fast as torch
        within = places.numpy()
        rounds = within // _DEALT_NUMEL
        return torch.from_numpy(within + (rounds * (self.count - 1) + part) * _DEALT_NUMEL)

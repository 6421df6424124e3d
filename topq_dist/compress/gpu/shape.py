"""What is known of a frame before its vector has been looked at: all but its unary stream."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from topq_dist.compress.codec import rice, tiled
from topq_dist.compress.codec.header import HEADER_BYTES, SEGMENTS_HEADER_BYTES
from topq_dist.compress.codec.lowbit import BLOCK_NUMEL, Counts
from topq_dist.compress.codec.segment_list import encode_ks
from topq_dist.compress.codec.values import LOW_BITS, VALUE_FORMATS, payload_bytes
from topq_dist.compress.gpu.memory import to_device

# those that the kernels write, by their numbers
FORMATS = {name: VALUE_FORMATS.index(name) for name in ("fp32", "fp16", "bf16", *LOW_BITS, "fp64")}


@dataclass(frozen=True, kw_only=True, eq=False)
class FrameShape:
    """A frame of `ks` values of each segment of a vector of `numel` elements, on a device."""

    numel: int
    ks: Counts
    value_format: str
    device: torch.device

    @cached_property
    def k(self) -> int:
        """How many values it holds, if any."""
        return int(self.ks.sum())

    @cached_property
    def rice_bits(self) -> int:
        """The Rice parameter; -1 where all elements are there, so that no index is."""
        return -1 if self.k == self.numel else tiled.choose_bits(self.numel, max(1, self.k))

    @property
    def tiles(self) -> int:
        """Tiles of indices."""
        return -(-self.k // tiled.TILE_NUMEL) if self.rice_bits >= 0 else 0

    @property
    def entry_words(self) -> int:
        """Words of each number of the directory."""
        return tiled.entry_bytes(self.numel) // 4

    @property
    def directory_bytes(self) -> int:
        """Bytes of the directory of tiles."""
        return tiled.directory_bytes(self.numel, self.k) if self.tiles else 0

    @property
    def low_bytes(self) -> int:
        """Bytes of the low bits of all gaps."""
        return rice.low_bytes(self.k, self.rice_bits) if self.tiles else 0

    @property
    def most_unary_bytes(self) -> int:
        """The most bytes that the unary stream can take."""
        if not self.tiles:
            return 0
        return (self.k + ((self.numel - self.k) >> self.rice_bits) + 7) // 8

    @cached_property
    def listed(self) -> Tensor:
        """The list of segments, uint8, of no bytes where there is none."""
        ks = self.ks[self.ks > 0]
        some = self.value_format in LOW_BITS and ks.size > 1
        listed = encode_ks(ks) if some else np.zeros(0, np.uint8)
        return to_device(torch.from_numpy(listed), self.device)

    @property
    def header_bytes(self) -> int:
        """Bytes of the header of a frame that holds values."""
        return HEADER_BYTES + (SEGMENTS_HEADER_BYTES if self.listed.numel() else 0)

    @cached_property
    def value_blocks(self) -> Tensor:
        """First value, number of values and segment of each block of values: int64 (blocks, 3)."""
        counts = -(-self.ks // BLOCK_NUMEL)
        segment = np.repeat(np.arange(self.ks.size), counts)
        number = np.arange(segment.size) - (np.cumsum(counts) - counts)[segment]
        first = (np.cumsum(self.ks) - self.ks)[segment] + number * BLOCK_NUMEL
        sizes = np.minimum(self.ks[segment] - number * BLOCK_NUMEL, BLOCK_NUMEL)
        table = np.stack([first, sizes, segment], axis=1).astype(np.int64)
        return to_device(torch.from_numpy(table), self.device)

    @property
    def blocks(self) -> int:
        """How many blocks of values there are."""
        return self.value_blocks.shape[0]

    @property
    def value_bytes(self) -> int:
        """Bytes of the values, scales included."""
        return payload_bytes(self.k, self.value_format, blocks=self.blocks)

    @cached_property
    def most_bytes(self) -> int:
        """The length that no frame exceeds, whichever its indices."""
        if self.k == 0:
            return HEADER_BYTES
        index_bytes = self.directory_bytes + self.most_unary_bytes + self.low_bytes
        return self.header_bytes + index_bytes + self.listed.numel() + self.value_bytes

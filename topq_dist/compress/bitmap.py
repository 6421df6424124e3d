"""Positions of the set bits of a sparse bitmap, in whole-array operations.

numpy's nonzero() pays a mispredicted branch at every hit where hits are few, and none where they
are more than one in ten. So the search goes down in three levels, words, bytes and bits, each among
what the level above has hit, where hits are frequent.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from topq_dist.compress.bits import Bytes

Positions = npt.NDArray[np.int64]

_FREQUENT = 0.1


def nonzero(vector: npt.NDArray[np.floating]) -> Positions:
    """Return where a 1-D vector, mostly zero, is not."""
    bitmap = np.zeros(-(-vector.size // 64) * 8, dtype=np.uint8)
    packed = np.packbits(vector != 0.0, bitorder="little")
    bitmap[: packed.size] = packed
    return set_bits(bitmap, count_set_bits(bitmap))


def count_set_bits(bitmap: Bytes) -> int:
    """Return how many bits are set; the bitmap's length is a multiple of 8 bytes."""
    return int(np.bitwise_count(bitmap.view(np.uint64)).sum(dtype=np.int64))


def set_bits(bitmap: Bytes, count: int) -> Positions:
    """Return the ascending positions of the `count` set bits, bit 0 of byte 0 being position 0.

    The bitmap's length is a multiple of 8 bytes.
    """
    if count > _FREQUENT * bitmap.size * 8:
        return np.unpackbits(bitmap, bitorder="little").view(bool).nonzero()[0]
    words = bitmap.view(np.uint64)
    word_at = (words != 0).nonzero()[0]
    inner_bytes = words.take(word_at, mode="clip").view(np.uint8)
    byte_in_words = (inner_bytes != 0).nonzero()[0]
    inner_bits = np.unpackbits(inner_bytes.take(byte_in_words, mode="clip"), bitorder="little")
    bit_in_bytes = inner_bits.view(bool).nonzero()[0]
    return _below(_below(word_at, byte_in_words), bit_in_bytes)


def _below(parents: Positions, children: Positions) -> Positions:
    """Return positions eight to a parent, from positions eight to an entry of `parents`."""
    positions: Positions = parents.take(children >> 3, mode="clip")
    positions <<= 3
    positions += children & 7
    return positions

"""Positions of the set bits of a sparse bitmap, in whole-array operations.

A bitmap of comparisons costs an eighth of a mask to write and to read again, and taking whole words
avoids the mispredicted branch that a mask's nonzero() pays at every hit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from topq_dist.compress.bits import Bytes

Positions = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint32]

_WORD_BITS_LOG2 = 5
# from here on most words are hit, many of them more than once
_DENSE = 0.06


def count_set_bits(bitmap: Bytes) -> int:
    """Return how many bits are set; the bitmap's length is a multiple of 8 bytes."""
    return int(np.bitwise_count(bitmap.view(np.uint64)).sum(dtype=np.int64))


def set_bits(bitmap: Bytes, count: int) -> Positions:
    """Return the ascending positions of the `count` set bits, bit 0 of byte 0 being position 0.

    The bitmap's length is a multiple of 8 bytes.
    """
    if count > _DENSE * bitmap.size * 8:
        return np.unpackbits(bitmap, bitorder="little").view(bool).nonzero()[0]
    words: Words = bitmap.view("<u4")
    hit = (words != 0).nonzero()[0]
    left = words.take(hit, mode="clip")
    starts = hit << _WORD_BITS_LOG2
    first = _take_lowest(left, starts)
    if hit.size == count:
        return first

    # words with several bits: round r takes bit r of each, which comes r places after the word's
    # first in the result
    again = left.nonzero()[0]
    left, starts = left.take(again, mode="clip"), starts.take(again, mode="clip")
    more = np.zeros(hit.size, dtype=np.int64)
    rounds = []
    while again.size:
        rounds.append((again, _take_lowest(left, starts)))
        more[again] += 1
        still = left.nonzero()[0]
        again, left = again.take(still, mode="clip"), left.take(still, mode="clip")
        starts = starts.take(still, mode="clip")
    places = np.cumsum(more)
    places -= more
    places += np.arange(hit.size)
    positions = np.empty(count, dtype=np.int64)
    positions[places] = first
    for place, (words_at, found) in enumerate(rounds, start=1):
        positions[places.take(words_at, mode="clip") + place] = found
    return positions


def _take_lowest(words: Words, starts: Positions) -> Positions:
    """Return starts + the position of each word's lowest set bit, and clear that bit in place."""
    below = words - np.uint32(1)
    trailing_zeros = np.bitwise_count(~words & below)
    words &= below
    return starts + trailing_zeros

"""The list of a frame's segments: how many of its values each has, so that a receiver knows.

Numbers in base 128, the least significant seven bits first, a byte each; the high bit is set in all
bytes of a number but its last (LEB128). Most take one or two bytes.
"""

from __future__ import annotations

import numpy as np

from topq_dist.compress.codec.bits import Bytes
from topq_dist.compress.codec.lowbit import Counts

# of a number below 2**35, and none is above k
LONGEST_BYTES = 5
_SHIFTS = 7 * np.arange(LONGEST_BYTES)


def encode_ks(ks: Counts) -> Bytes:
    """Return the list of these numbers, which lie in [1, 2**35)."""
    left = ks[:, None] >> _SHIFTS
    groups = left & 127 | (left > 127) << 7
    return groups[left > 0].astype(np.uint8)


def decode_ks(listed: Bytes, k: int) -> Counts:
    """Return the two or more numbers of a list, which add up to `k`; ValueError for any other."""
    is_last = listed < 128
    ends = is_last.nonzero()[0]
    if ends.size < 2 or ends[-1] != listed.size - 1:
        raise ValueError(f"a list of {ends.size} whole numbers of segments: expected two or more")
    # a last byte of zero is a number of zero, or one that could do with fewer bytes
    if not listed[ends].all():
        raise ValueError("a segment's number of values is zero, or longer than it need be")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > LONGEST_BYTES:
        raise ValueError(f"a segment's number of values has {lengths.max()} bytes: expected 5")
    shifts = 7 * (np.arange(listed.size) - np.repeat(starts, lengths))
    ks = np.add.reduceat((listed & 127).astype(np.int64) << shifts, starts)
    # each of them first, or a sum past 64 bits could come out right
    if ks.max() > k or ks.sum() != k:
        raise ValueError(f"segments do not add up to {k} values")
    return ks

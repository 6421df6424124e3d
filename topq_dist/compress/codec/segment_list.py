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


def encode_ks(ks: Counts) -> Bytes:
    """Return the list of these numbers, which lie in [1, 2**35)."""
    listed = bytearray()
    # numpy takes longer for the few that there are
    for left in ks.tolist():
        while left > 127:
            listed.append(left & 127 | 128)
            left >>= 7
        listed.append(left)
    return np.frombuffer(listed, np.uint8)


def decode_ks(listed: Bytes, k: int) -> Counts:
    """Return the two or more numbers of a list, which add up to `k`; ValueError for any other."""
    ks: list[int] = []
    number = length = 0
    for byte in listed.tobytes():
        if length == LONGEST_BYTES:
            raise ValueError(f"a segment's number of values has over {LONGEST_BYTES} bytes")
        number |= (byte & 127) << 7 * length
        length += 1
        if byte > 127:
            continue
        if byte == 0:
            raise ValueError("a segment's number of values is zero, or longer than it need be")
        ks.append(number)
        number = length = 0
    if len(ks) < 2 or length:
        raise ValueError(f"a list of {len(ks)} whole numbers of segments: expected two or more")
    if sum(ks) != k:
        raise ValueError(f"segments do not add up to {k} values")
    return np.array(ks, np.int64)

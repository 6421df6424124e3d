"""Bit fields of a fixed width: field i is in bits [i * width, (i + 1) * width) of its stream.

Bits count from the least significant one; the last byte is filled up with zero bits.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def packed_bytes(count: int, width: int) -> int:
    """Return how many bytes `count` fields of `width` bits take."""
    return (count * width + 7) // 8


def padding_is_zero(stream: Bytes, used_bits: int) -> bool:
    """Return whether every bit of the stream's last byte past `used_bits` is zero."""
    spare = stream.size * 8 - used_bits
    return spare == 0 or int(stream[-1]) >> (8 - spare) == 0

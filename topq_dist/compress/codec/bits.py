"""Fixed-width bit fields of 1 to 7 bits, packed and unpacked in whole-array operations.

Field i occupies bits [i * width, (i + 1) * width) of the stream, least significant bit first; the
last byte is filled up with zero bits. Neighbours are merged in pairs (bytes to 16, 32 and 64 bits),
so that eight fields become `width` bytes in three passes over contiguous memory.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def packed_bytes(count: int, width: int) -> int:
    """Return how many bytes `count` fields of `width` bits take."""
    return (count * width + 7) // 8


def pack_fields(fields: Bytes, width: int) -> Bytes:
    """Return the stream of `fields`, a uint8 array whose values are below 2**width."""
    count = fields.size
    groups = np.zeros((count + 7) // 8, dtype="<u8")
    groups.view(np.uint8)[:count] = fields
    for lane, half in (("<u2", 8), ("<u4", 16), ("<u8", 32)):
        merged = groups.view(lane)
        # high half moves down from bit `half` to bit `half * width / 8`
        high = merged >> half
        high *= np.array((1 << half) - (1 << (half * width // 8)), dtype=lane)
        merged -= high
    stream = groups.view(np.uint8).reshape(-1, 8)[:, :width].reshape(-1)
    return stream[: packed_bytes(count, width)]


def unpack_fields(stream: Bytes, count: int, width: int) -> Bytes:
    """Return the `count` fields of `stream`, which has exactly packed_bytes(count, width) bytes."""
    whole = count // 8
    groups = np.zeros((count + 7) // 8, dtype="<u8")
    lanes = groups.view(np.uint8).reshape(-1, 8)
    lanes[:whole, :width] = stream[: whole * width].reshape(whole, width)
    rest = stream[whole * width :]
    if rest.size:
        lanes[whole, : rest.size] = rest
    for lane, half in (("<u8", 32), ("<u4", 16), ("<u2", 8)):
        merged = groups.view(lane)
        high = merged >> (half * width // 8)
        high *= np.array((1 << half) - (1 << (half * width // 8)), dtype=lane)
        merged += high
    return groups.view(np.uint8)[:count]


def padding_is_zero(stream: Bytes, used_bits: int) -> bool:
    """Return whether every bit of the stream's last byte past `used_bits` is zero."""
    spare = stream.size * 8 - used_bits
    return spare == 0 or int(stream[-1]) >> (8 - spare) == 0

"""Values in 8, 4 or 2 bits: a sign and a level of the block's own magnitude range.

What top-k selects lies above a threshold, so a block's magnitudes fill [low, high] with low well
away from zero; levels spread over [0, high] would waste the bottom ones. Each block of up to 128
values stores two bf16 numbers, `base` and `step`, and a code of sign and level m for each value,
which decodes to sign * (base + m * step). With 8 and 4 bits base is the smallest magnitude and the
top level reaches the largest. With 2 bits there are two levels, the means of the magnitudes below
and above their mean, which is one step of Lloyd's algorithm (1957) and leaves the block's sum of
magnitudes unchanged.

Blocks begin anew with each segment (parameter), so that one of small gradients does not share a
scale with one of large ones, and what becomes of a value does not depend on what lies beside its
segment.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from topq_dist.compress import kernels
from topq_dist.compress.codec.bits import Bytes, packed_bytes

BLOCK_NUMEL = 128
Singles = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]


def block_count(ks: Counts, block_numel: int = BLOCK_NUMEL) -> int:
    """Return how many blocks segments of so many values each come to."""
    return int(np.add.reduce(-(-ks // block_numel)))


def lowbit_bytes(count: int, bits: int, blocks: int) -> int:
    """Return the bytes of `count` values in so many blocks: 4 a block, then the packed codes."""
    return blocks * 4 + packed_bytes(count, bits)


def encode_blocks(values: Singles, bits: int, ks: Counts) -> tuple[Bytes, Singles]:
    """Return the payload of finite fp32 `values`, and what it decodes to.

    `ks`, which add up to their number, says how many values each segment has.
    """
    blocks = block_count(ks)
    payload = np.empty(lowbit_bytes(values.size, bits, blocks), np.uint8)
    decoded = np.empty(values.size, np.float32)
    scales, packed = payload[: 4 * blocks], payload[4 * blocks :]
    kernels.encode_blocks(values, ks, bits, scales, packed, decoded)
    return payload, decoded


def decode_blocks(payload: Bytes, count: int, bits: int, ks: Counts) -> Singles:
    """Return the `count` fp32 values of a payload of segments of `ks` values.

    Raises ValueError where padding bits are not zero, or a value, of altered scales, not finite.
    """
    values = np.empty(count, np.float32)
    kernels.decode_blocks(payload, ks, bits, values)
    return values

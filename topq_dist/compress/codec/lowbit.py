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

from topq_dist.compress.codec.bits import (
    Bytes,
    pack_fields,
    packed_bytes,
    padding_is_zero,
    unpack_fields,
)
from topq_dist.compress.kernels.codec import (
    magnitude_ranges,
    nearest_levels,
    two_means,
    values_of_levels,
)
from topq_dist.compress.native import binding, library

BLOCK_NUMEL = 128
Singles = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]
# base + top * step, with step rounded up, stays finite below this
_LARGEST = np.float32(2.0**127)


def block_count(ks: Counts) -> int:
    """Return how many blocks segments of so many values each come to."""
    return int((-(-ks // BLOCK_NUMEL)).sum())


def lowbit_bytes(count: int, bits: int, blocks: int) -> int:
    """Return the bytes of `count` values in so many blocks: 4 a block, then the packed codes."""
    return blocks * 4 + packed_bytes(count, bits)


def encode_blocks(values: Singles, bits: int, ks: Counts) -> tuple[Bytes, Singles]:
    """Return the payload of finite fp32 `values`, and what it decodes to.

    `ks`, which add up to their number, says how many values each segment has.
    """
    if library.LIBRARY is not None:
        blocks = block_count(ks)
        written = np.empty(lowbit_bytes(values.size, bits, blocks), np.uint8)
        decoded = np.empty(values.size, np.float32)
        binding.encode_blocks(
            values, ks, bits, written[: 4 * blocks], written[4 * blocks :], decoded
        )
        return written, decoded
    magnitudes = np.minimum(np.abs(values), _LARGEST)
    base, step = _two_levels(magnitudes, ks) if bits == 2 else _spread_levels(magnitudes, ks, bits)
    codes = np.empty(values.size, np.uint8)
    top = np.float32((1 << (bits - 1)) - 1)
    nearest_levels(magnitudes, ks, BLOCK_NUMEL, base, step, top, codes)
    codes |= np.signbit(values).view(np.uint8) << np.uint8(bits - 1)
    scales = np.stack([_bf16_bits(base), _bf16_bits(step)], axis=1).reshape(-1)
    packed = codes if bits == 8 else pack_fields(codes, bits)
    payload = np.concatenate([scales.astype("<u2").view(np.uint8), packed])
    return payload, _values_of(codes, ks, base, step, bits)


def decode_blocks(payload: Bytes, count: int, bits: int, ks: Counts) -> Singles:
    """Return the `count` fp32 values of a payload of segments of `ks` values.

    Raises ValueError where padding bits are not zero. Altered scales can decode to non-finite
    values: the caller checks.
    """
    if library.LIBRARY is not None:
        values = np.empty(count, np.float32)
        binding.decode_blocks(payload, ks, bits, values)
        return values
    scale_bytes = block_count(ks) * 4
    scales = payload[:scale_bytes].copy().view("<u2").astype(np.uint32) << 16
    base, step = np.ascontiguousarray(scales.view(np.float32).reshape(-1, 2).T)
    packed = payload[scale_bytes:]
    if not padding_is_zero(packed, count * bits):
        raise ValueError("values end in bits that are not zero")
    codes = packed if bits == 8 else unpack_fields(packed, count, bits)
    return _values_of(codes, ks, base, step, bits)


def _spread_levels(magnitudes: Singles, ks: Counts, bits: int) -> tuple[Singles, Singles]:
    top = (1 << (bits - 1)) - 1
    low, high = np.empty((2, block_count(ks)), np.float32)
    magnitude_ranges(magnitudes, ks, BLOCK_NUMEL, low, high)
    base = _round_bf16(low, up=False)
    return base, _round_bf16((high - base) / np.float32(top), up=True)


def _two_levels(magnitudes: Singles, ks: Counts) -> tuple[Singles, Singles]:
    below, above = np.empty((2, block_count(ks)), np.float64)
    two_means(magnitudes, ks, np.empty(BLOCK_NUMEL, np.float64), below, above)
    base = _round_bf16(below.astype(np.float32), up=False)
    return base, _round_bf16((above - base).astype(np.float32), up=False)


def _round_bf16(numbers: Singles, *, up: bool) -> Singles:
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    if up:
        bits = bits + np.uint32(0xFFFF)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def _bf16_bits(numbers: Singles) -> npt.NDArray[np.uint16]:
    return (numbers.view(np.uint32) >> 16).astype(np.uint16)


def _values_of(codes: Bytes, ks: Counts, base: Singles, step: Singles, bits: int) -> Singles:
    values = np.empty(codes.size, np.float32)
    values_of_levels(codes, ks, BLOCK_NUMEL, base, step, bits, values, values.view(np.uint32))
    return values

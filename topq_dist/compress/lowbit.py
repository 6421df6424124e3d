"""Values in 8, 4 or 2 bits: a sign and a level of the block's own magnitude range.

What top-k keeps lies above a threshold, so a block's magnitudes fill [low, high] with low well away
from zero; levels spread over [0, high] would waste the bottom ones. Each block of 128 values
stores two bf16 numbers, `base` and `step`, and a code of sign and level m for each value, which
decodes to sign * (base + m * step). With 8 and 4 bits base is the smallest magnitude and the top
level reaches the largest. With 2 bits there are two levels, the means of the magnitudes below and
above their mean, which is one step of Lloyd's algorithm (1957) and leaves the block's sum of
magnitudes unchanged.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from topq_dist.compress.bits import Bytes, pack_fields, packed_bytes, padding_is_zero, unpack_fields

BLOCK_NUMEL = 128
Singles = npt.NDArray[np.float32]
# base + top * step, with step rounded up, stays finite below this
_LARGEST = np.float32(2.0**127)


def lowbit_bytes(count: int, bits: int) -> int:
    """Return the bytes of `count` values: 4 a block, then the packed codes."""
    return -(-count // BLOCK_NUMEL) * 4 + packed_bytes(count, bits)


def encode_blocks(values: Singles, bits: int) -> tuple[Bytes, Singles]:
    """Return the payload of finite fp32 `values`, and what it decodes to."""
    count = values.size
    if count == 0:
        return np.zeros(0, np.uint8), np.zeros(0, np.float32)
    blocks = _in_blocks(np.minimum(np.abs(values), _LARGEST))
    base, step = _two_levels(blocks) if bits == 2 else _spread_levels(blocks, bits)
    top = (1 << (bits - 1)) - 1
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        levels = (blocks - base[:, None]) / step[:, None]
    np.nan_to_num(levels, copy=False, nan=0.0)
    np.rint(levels, out=levels)
    np.clip(levels, 0, top, out=levels)
    codes = levels.astype(np.uint8).reshape(-1)[:count]
    codes |= np.signbit(values).astype(np.uint8) << (bits - 1)
    scales = np.stack([_bf16_bits(base), _bf16_bits(step)], axis=1).reshape(-1)
    packed = codes if bits == 8 else pack_fields(codes, bits)
    payload = np.concatenate([scales.astype("<u2").view(np.uint8), packed])
    return payload, _levels_of(codes, base, step, bits)


def decode_blocks(payload: Bytes, count: int, bits: int) -> Singles:
    """Return the fp32 values of a payload of lowbit_bytes(count, bits) bytes.

    Raises ValueError where padding bits are not zero. Altered scales can decode to non-finite
    values: the caller checks.
    """
    scale_bytes = -(-count // BLOCK_NUMEL) * 4
    scales = payload[:scale_bytes].copy().view("<u2").astype(np.uint32) << 16
    base, step = scales.view(np.float32).reshape(-1, 2).T
    packed = payload[scale_bytes:]
    if not padding_is_zero(packed, count * bits):
        raise ValueError("values end in bits that are not zero")
    codes = packed if bits == 8 else unpack_fields(packed, count, bits)
    return _levels_of(codes, base, step, bits)


def _in_blocks(magnitudes: Singles) -> Singles:
    # the last block is filled up with its own last value, which moves neither end of its range
    return np.pad(magnitudes, (0, -magnitudes.size % BLOCK_NUMEL), mode="edge").reshape(
        -1, BLOCK_NUMEL
    )


def _spread_levels(blocks: Singles, bits: int) -> tuple[Singles, Singles]:
    top = (1 << (bits - 1)) - 1
    base = _round_bf16(blocks.min(axis=1), up=False)
    step = _round_bf16((blocks.max(axis=1) - base) / np.float32(top), up=True)
    return base, step


def _two_levels(blocks: Singles) -> tuple[Singles, Singles]:
    wide = blocks.astype(np.float64)
    above = wide > wide.mean(axis=1, keepdims=True)
    count_above = above.sum(axis=1)
    sum_above = (wide * above).sum(axis=1)
    base = (wide.sum(axis=1) - sum_above) / (BLOCK_NUMEL - count_above)
    high = np.where(count_above > 0, sum_above / np.maximum(count_above, 1), base)
    rounded = _round_bf16(base.astype(np.float32), up=False)
    return rounded, _round_bf16((high - rounded).astype(np.float32), up=False)


def _round_bf16(numbers: Singles, *, up: bool) -> Singles:
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    if up:
        bits = bits + np.uint32(0xFFFF)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def _bf16_bits(numbers: Singles) -> npt.NDArray[np.uint16]:
    return (numbers.view(np.uint32) >> 16).astype(np.uint16)


def _levels_of(codes: Bytes, base: Singles, step: Singles, bits: int) -> Singles:
    count = codes.size
    sign_bit = np.uint8(1 << (bits - 1))
    magnitudes = _in_blocks_of_levels(codes & (sign_bit - np.uint8(1)), step.size)
    with np.errstate(over="ignore", invalid="ignore"):
        magnitudes *= step[:, None]
        magnitudes += base[:, None]
    decoded = magnitudes.reshape(-1)[:count]
    signs = (codes & sign_bit).astype(np.uint32) << (32 - bits)
    decoded.view(np.uint32)[...] |= signs
    return decoded


def _in_blocks_of_levels(levels: Bytes, block_count: int) -> Singles:
    blocks = np.zeros(block_count * BLOCK_NUMEL, dtype=np.float32)
    blocks[: levels.size] = levels
    return blocks.reshape(block_count, BLOCK_NUMEL)

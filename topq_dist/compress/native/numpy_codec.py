"""The kernels of coding in numpy; see numpy_kernels.py for what holds of all of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from topq_dist.compress.native.numpy_kernels import Array, quiet

# values that share two scales, and what is sent of a larger magnitude
_BLOCK = 128
_LARGEST = np.float32(2.0**127)
# sums are of so many numbers each, and of these in pairs
_SUMS = 8


def gaps_between(indices: Array, numel: int, gaps: Array) -> bool:
    """Write how many positions are skipped before each index; False unless they ascend in range."""
    previous = np.concatenate([[-1], indices[:-1]])
    if not ((indices > previous) & (indices < numel)).all():
        return False
    gaps[:] = indices - previous[: indices.size] - 1
    return True


def sums_of_quotients(gaps: Array, bits: int, sums: Array) -> None:
    """sums[i] = the sum of gaps >> bits + i."""
    for at in range(sums.size):
        sums[at] = (gaps >> bits + at).sum(dtype=np.int64)


def write_gaps(gaps: Array, bits: int, unary: Array, planes: Array, fields: Array) -> None:
    """Write gaps in Rice code."""
    ones = np.zeros(8 * unary.size, np.bool_)
    ones[np.cumsum((gaps >> bits) + 1, dtype=np.int64) - 1] = True
    unary[:] = np.packbits(ones, bitorder="little")
    whole, width = divmod(bits, 8)
    for plane in range(whole):
        planes[plane] = (gaps >> 8 * plane) & 255
    low = (gaps >> 8 * whole)[:, None] >> np.arange(width, dtype=gaps.dtype) & 1
    fields[:] = np.packbits(low.astype(np.bool_).reshape(-1), bitorder="little")


def read_gaps(
    unary: Array, planes: Array, fields: Array, bits: int, indices: Array
) -> tuple[int, int]:
    """Undo write_gaps; return how many codes there are, or one too many, and the last's bit."""
    ones = np.flatnonzero(np.unpackbits(unary.view(np.uint8), bitorder="little"))
    found = ones[: indices.size]
    gaps = (np.diff(found, prepend=-1) - 1) << bits
    whole, width = divmod(bits, 8)
    for plane in range(whole):
        gaps |= planes[plane, : found.size].astype(np.int64) << 8 * plane
    low = np.unpackbits(fields, bitorder="little")[: found.size * width].reshape(found.size, width)
    gaps |= (low.astype(np.int64) << np.arange(width)).sum(axis=1) << 8 * whole
    indices[: found.size] = np.cumsum(gaps + 1) - 1
    return min(ones.size, indices.size + 1), int(found[-1]) if found.size else -1


@quiet
def round_to_half(numbers: Array, scale: Any, scaled: Array, bits: Array, halves: Array) -> None:
    """halves = the bits of fp16(numbers * scale), and scaled the products."""
    np.multiply(numbers, np.float32(scale), out=scaled)
    halves[:] = scaled.astype(np.float16).view(np.uint16)


@quiet
def widen_half(halves: Array, scale: Any, widened: Array, bits: Array) -> bool:
    """widened = fp32(halves) * scale; return False where a number is not finite."""
    np.multiply(halves.view(np.float16).astype(np.float32), np.float32(scale), out=widened)
    return bool(np.isfinite(widened).all())


def split_halves(halves: Array, high: Array, low: Array, *, rotated: bool) -> None:
    """Write the bytes of numbers of two; rotated: of numbers turned left by one bit."""
    turned = _turned(halves, 1) if rotated else halves
    # casts are several times as fast as views of every other byte
    high[:] = (turned >> 8).astype(np.uint8)
    low[:] = turned.astype(np.uint8)


def join_halves(high: Array, low: Array, halves: Array, *, rotated: bool) -> None:
    """Undo split_halves."""
    halves[:] = high
    halves <<= 8
    halves |= low
    if rotated:
        halves[:] = _turned(halves, 15)


def _turned(halves: Array, bits: int) -> Array:
    turned: Array = np.left_shift(halves, bits)
    turned |= np.right_shift(halves, 16 - bits)
    return turned


@quiet
def encode_blocks(
    values: Array, ks: Array, code_bits: int, scales: Array, packed: Array, decoded: Array
) -> None:
    """Write values in blocks of levels."""
    magnitudes = largest_magnitudes(values)
    sizes, top = _block_sizes(ks), (1 << (code_bits - 1)) - 1
    base, step = (
        _two_levels(magnitudes, sizes) if code_bits == 2 else _levels(magnitudes, sizes, top)
    )
    lowest, gap = np.repeat(base, sizes), np.repeat(step, sizes)
    nearest = np.clip(np.rint((magnitudes - lowest) / gap), np.float32(0), np.float32(top))
    levels = np.where(gap == 0, np.where(magnitudes > lowest, np.float32(top), 0), nearest)
    codes = levels.astype(np.uint8) | np.signbit(values).view(np.uint8) << np.uint8(code_bits - 1)
    both = np.stack([base, step], axis=1).view(np.uint32) >> 16
    scales[:] = both.astype("<u2").reshape(-1).view(np.uint8)
    each = 8 // code_bits
    fields = np.zeros((packed.size, each), np.uint8)
    fields.reshape(-1)[: codes.size] = codes
    packed[:] = np.bitwise_or.reduce(fields << _places(code_bits), axis=1)
    decoded[:] = _values_of(codes, code_bits, lowest, gap)


@quiet
def decode_blocks(payload: Array, ks: Array, code_bits: int, values: Array) -> None:
    """Undo encode_blocks; raise ValueError for a payload that is none of so many values."""
    if (ks.size and (ks.min() < 0 or ks.max() > values.size)) or ks.sum() != values.size:
        raise ValueError("values do not take the bytes that they have")
    sizes = _block_sizes(ks)
    scales, packed = np.split(payload, [4 * sizes.size])
    if packed.size != -(-values.size * code_bits // 8) or scales.size != 4 * sizes.size:
        raise ValueError("values do not take the bytes that they have")
    fields = packed[:, None] >> _places(code_bits) & np.uint8((1 << code_bits) - 1)
    codes, padding = np.split(fields.reshape(-1), [values.size])
    if padding.any():
        raise ValueError("values end in bits that are not zero")
    base, step = (
        (scales.copy().view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(-1, 2).T
    )
    values[:] = _values_of(codes, code_bits, np.repeat(base, sizes), np.repeat(step, sizes))
    if not np.isfinite(values).all():
        raise ValueError("a value is not finite")


@quiet
def bound_rows(values: Array, ks: Array, row_numels: Array, bound: float, bounded: Array) -> None:
    """Clip each row's values to `bound` times their mean magnitude."""
    filled = ks > 0
    ks, row_numels = ks[filled], row_numels[filled]
    if not ks.size:
        return
    # in one piece and in double precision, or the sum would depend on what lies beside a row
    magnitudes = np.abs(values).astype(np.float64)
    limits = np.add.reduceat(magnitudes, np.cumsum(ks) - ks) * (bound / ks)
    limits[2 * ks >= row_numels] = np.inf
    limit = np.repeat(limits.astype(values.dtype), ks)
    # one of sent and excess must give way for their sum to be the value: the limit, not the excess
    excess = values - np.maximum(np.minimum(values, limit), -limit)
    np.subtract(values, excess, out=bounded)


def _block_sizes(ks: Array) -> Array:
    """Return the sizes of the blocks of segments of so many values."""
    counts = -(-ks // _BLOCK)
    sizes = np.full(int(counts.sum()), _BLOCK)
    filled = counts > 0
    sizes[np.cumsum(counts)[filled] - 1] = ks[filled] - (counts[filled] - 1) * _BLOCK
    return sizes


def _levels(magnitudes: Array, sizes: Array, top: int) -> tuple[Array, Array]:
    """Return the scales of 4 and 8 bits: `top` steps lead from the smallest past the largest."""
    starts = np.cumsum(sizes) - sizes
    if not starts.size:
        return magnitudes, magnitudes
    base = _round_bf16(np.minimum.reduceat(magnitudes, starts))
    largest = np.maximum.reduceat(magnitudes, starts)
    return base, _round_bf16((largest - base) / np.float32(top), up=True)


def _two_levels(magnitudes: Array, sizes: Array) -> tuple[Array, Array]:
    """Return the scales of 2 bits: the means of the magnitudes up to and above their mean."""
    blocks = np.zeros((sizes.size, _BLOCK))
    blocks[np.arange(_BLOCK) < sizes[:, None]] = magnitudes
    total = sums_of_rows(blocks)
    is_above = blocks > (total / sizes)[:, None]
    count_above = np.count_nonzero(is_above, axis=1)
    sum_above = sums_of_rows(np.where(is_above, blocks, 0.0))
    below = (total - sum_above) / (sizes - count_above)
    above = np.where(count_above, sum_above / np.maximum(count_above, 1), below)
    base = _round_bf16(below.astype(np.float32))
    return base, _round_bf16((above - base).astype(np.float32))


def largest_magnitudes(values: Array) -> Array:
    """Return magnitudes, the largest ones as what is sent of them."""
    return np.minimum(np.abs(values), _LARGEST)


def sums_of_rows(blocks: Array) -> Array:
    """Return the sum of each row in fp64: in lanes, and these in pairs, as the kernels do it."""
    lanes = np.zeros((blocks.shape[0], _SUMS))
    for start in range(0, blocks.shape[1], _SUMS):
        lanes += blocks[:, start : start + _SUMS]
    pairs = lanes[:, 0::2] + lanes[:, 1::2]
    return (pairs[:, 0] + pairs[:, 1]) + (pairs[:, 2] + pairs[:, 3])


def _round_bf16(numbers: Array, *, up: bool = False) -> Array:
    bits = numbers.view(np.uint32) + np.uint32(0xFFFF if up else 0)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def _values_of(codes: Array, code_bits: int, base: Array, step: Array) -> Array:
    levels = (codes & ((1 << (code_bits - 1)) - 1)).astype(np.float32)
    values = levels * step + base
    signs = codes.astype(np.uint32) << (32 - code_bits) & np.uint32(1 << 31)
    return (values.view(np.uint32) | signs).view(np.float32)


def _places(code_bits: int) -> Array:
    return np.arange(0, 8, code_bits, dtype=np.uint8)

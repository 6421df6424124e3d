"""Entropy-coded values: signs and levels of few bits, and fp16 and bf16 without loss.

What top-k selects begins at a threshold and thins out above it about exponentially, so that levels
of one width are unlike in number, and levels of one width are then the best for their entropy
(Sullivan, "Efficient scalar quantization of exponential and Laplacian random variables", 1996).
Each block of up to 4096 values stores two bf16 numbers, `base` and `step`, and a sign and a level m
of each value, which decodes to sign * (base + m * step), in this order: all bases; the steps of
blocks of two values or more; signs, a bit each; levels, see symbols.py. The encoder's steps are
about a ratio (STEP_RATIOS) of the block's mean excess over its least magnitude, base and step those
of the least squares. Where a bound has clipped values, most excesses are alike: then one or two
levels are left. Blocks begin anew with each segment, as lowbit.py's do.

fp16 and bf16 go apart into bytes of what is alike in all values (fp16's sign, exponent and two
bits of mantissa; bf16's exponent), coded, behind the other bytes, as they are.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from topq_dist.compress import kernels
from topq_dist.compress.codec.bits import Bytes, packed_bytes
from topq_dist.compress.codec.lowbit import Counts, Singles
from topq_dist.compress.codec.symbols import (
    decode_symbols,
    encode_symbols,
    most_bytes,
    scratch_bytes,
)
from topq_dist.compress.kernels.scratch import scratch

LEVELS_BLOCK_NUMEL = 4096
# a step over the mean excess of a block
STEP_RATIOS = {"ec1": 2.1, "ec2": 1.3}
Halves = npt.NDArray[np.uint16]


def most_levels_bytes(count: int, blocks: int) -> int:
    """Return the most bytes of `count` values in so many blocks."""
    return 4 * blocks + packed_bytes(count, 1) + most_bytes(count)


def most_halves_bytes(count: int) -> int:
    """Return the most bytes of `count` values of two bytes."""
    return count + most_bytes(count)


def encode_levels(values: Singles, ratio: float, ks: Counts) -> tuple[Bytes, Singles]:
    """Return the payload of finite fp32 `values`, and what it decodes to.

    ks: how many values each segment has; they add up to their number.
    """
    blocks, several = _block_counts(ks)
    # kept between calls: new memory costs more than what is done in it
    levels, room = np.split(scratch.coding(values.size + scratch_bytes(values.size)), [values.size])
    scales_bytes = 2 * (blocks + several)
    plain = np.empty(scales_bytes + packed_bytes(values.size, 1), np.uint8)
    bases, steps, signs = np.split(plain, [2 * blocks, scales_bytes])
    decoded = np.empty(values.size, np.float32)
    kernels.encode_levels(values, ks, ratio, bases, steps, signs, levels, decoded)
    return np.concatenate([plain, encode_symbols(levels, room)]), decoded


def decode_levels(payload: Bytes, count: int, ks: Counts) -> Singles:
    """Return the `count` fp32 values of a payload of segments of `ks` values.

    Raises ValueError for a payload that encode_levels does not write.
    """
    scale_bytes = 2 * sum(_block_counts(ks))
    scales, signs, code = np.split(payload, [scale_bytes, scale_bytes + packed_bytes(count, 1)])
    values = np.empty(count, np.float32)
    kernels.decode_levels(scales, signs, decode_symbols(code, count), ks, values)
    return values


def encode_halves(halves: Halves, *, rotated: bool) -> Bytes:
    """Return the payload of the bits of numbers of two bytes; rotated: bf16's."""
    size = halves.size
    high, low, room = np.split(scratch.coding(2 * size + scratch_bytes(size)), [size, 2 * size])
    kernels.split_halves(halves, high, low, rotated=rotated)
    return np.concatenate([low, encode_symbols(high, room)])


def decode_halves(payload: Bytes, count: int, *, rotated: bool) -> Halves:
    """Return the bits of `count` numbers; ValueError for what encode_halves does not write."""
    if payload.size < count:
        raise ValueError("values do not take the bytes that they have")
    low, code = np.split(payload, [count])
    halves = np.empty(count, np.uint16)
    kernels.join_halves(decode_symbols(code, count), low, halves, rotated=rotated)
    return halves


def levels_in(payload: Bytes, count: int, *, halves: bool) -> Bytes:
    """Return what is coded in the payload of `count` values of one segment, a byte each."""
    blocks = _block_counts(np.array([count]))
    plain = count if halves else 2 * sum(blocks) + packed_bytes(count, 1)
    return decode_symbols(payload[plain:], count)


def _block_counts(ks: Counts) -> tuple[int, int]:
    """Return how many blocks there are, and how many of two values or more."""
    whole, rest = np.divmod(ks, LEVELS_BLOCK_NUMEL)
    return int((whole + (rest > 0)).sum()), int((whole + (rest > 1)).sum())

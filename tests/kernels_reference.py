"""The kernels' results by numpy alone: a second opinion, written for shortness and not for speed.

Arguments are those of the kernels of the same names, but for scratch; outputs are returned.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def keys_of(numbers: Array) -> Array:
    """Return bit patterns without the sign."""
    bits: Array = numbers.view(f"u{numbers.itemsize}")
    keys: Array = bits & bits.dtype.type(np.iinfo(bits.dtype).max // 2)
    return keys


def find_reaching(
    vector: Array, residual: Array | None, low: int, begin: int
) -> tuple[Array, Array]:
    """Return the indices and the numbers of all that reach `low`."""
    with np.errstate(all="ignore"):
        numbers = vector if residual is None else vector + residual
    where = np.flatnonzero(keys_of(numbers).astype(np.uint64) >= np.uint64(low))
    return where + begin, numbers[where]


def keep_largest(bits: Array, k: int) -> Array:
    """Return where the k largest are, the first ones of those that tie."""
    return np.sort(np.argsort(~keys_of(bits), kind="stable")[:k])


def add_terms(out: Array, terms: Array, summands: Array) -> Array:
    """Return out with out[terms] += summands, one after the other."""
    total = out.copy()
    with np.errstate(all="ignore"):
        np.add.at(total, terms, summands)
    return total


def update_residual(residual: Array, gradient: Array, indices: Array, rest: Array) -> Array:
    """Return the residual after residual += gradient, then residual[indices] = rest."""
    with np.errstate(all="ignore"):
        total = residual + gradient
    total[indices] = rest
    return total


def write_gaps(gaps: Array, bits: int) -> tuple[Array, Array, Array]:
    """Return the streams of unary codes, whole bytes and fields."""
    ends = np.cumsum((gaps >> bits) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1 if gaps.size else 0, np.uint8)
    unary[ends] = 1
    whole, width = divmod(bits, 8)
    planes = [(gaps >> (8 * plane) & 255).astype(np.uint8) for plane in range(whole)]
    field_bits = (gaps >> (8 * whole))[:, None] >> np.arange(width) & 1
    packed = [
        np.packbits(stream, bitorder="little")
        for stream in (unary, field_bits.reshape(-1).astype(np.uint8))
    ]
    return packed[0], np.array(planes, np.uint8).reshape(whole, gaps.size), packed[1]


def widen_half(halves: Array, scale: float) -> Array:
    """Return fp32(halves) * scale."""
    with np.errstate(all="ignore"):
        return halves.view(np.float16).astype(np.float32) * np.float32(scale)


def blocks_of(ks: Array, block_numel: int) -> list[slice]:
    """Return where each block lies: up to block_numel values, anew with each segment."""
    found, start = [], 0
    for k in ks.tolist():
        end = start + k
        found += [slice(at, min(at + block_numel, end)) for at in range(start, end, block_numel)]
        start = end
    return found


def two_means(block: Array, block_numel: int) -> tuple[float, float]:
    """Return the means of a block's magnitudes up to and above their mean."""

    def lanes(numbers: Array) -> np.float64:
        total = np.zeros(8)
        for row in np.resize(numbers, block_numel).reshape(-1, 8):
            total += row
        pairs = total[0::2] + total[1::2]
        return np.float64((pairs[0] + pairs[1]) + (pairs[2] + pairs[3]))

    numbers = np.zeros(block_numel)
    numbers[: block.size] = block
    total = lanes(numbers)
    above = numbers > total / block.size
    sum_above, count_above = lanes(np.where(above, numbers, 0.0)), int(above.sum())
    below = (total - sum_above) / (block.size - count_above)
    return float(below), float(sum_above / count_above if count_above else below)


def scales(block: Array, code_bits: int) -> tuple[np.float32, np.float32]:
    """Return a block's base and step."""

    def cut_off(number: np.float32, more: int = 0) -> np.float32:
        bits = (number.view(np.uint32) + np.uint32(more)) & np.uint32(0xFFFF0000)
        return np.float32(bits.view(np.float32))

    if code_bits == 2:
        below, above = two_means(block, 128)
        base = cut_off(np.float32(below))
        return base, cut_off(np.float32(above - np.float64(base)))
    base = cut_off(block.min())
    top = np.float32((1 << (code_bits - 1)) - 1)
    return base, cut_off((block.max() - base) / top, 0xFFFF)


def nearest_levels(block: Array, base: np.float32, step: np.float32, top: int) -> Array:
    """Return each magnitude's nearest level in [0, top]."""
    if step == 0.0:
        return np.where(block > base, top, 0).astype(np.uint8)
    with np.errstate(over="ignore"):
        levels: Array = np.clip(np.rint((block - base) / step), 0, top).astype(np.uint8)
    return levels


def values_of_levels(codes: Array, base: np.float32, step: np.float32, width: int) -> Array:
    """Return what a block's codes stand for."""
    levels = (codes & ((1 << (width - 1)) - 1)).astype(np.float32)
    negative = codes >> (width - 1) & 1 == 1
    values: Array = levels * step + base
    values.view(np.uint32)[negative] |= np.uint32(1 << 31)
    return values


def owners(indices: Array, block_numel: int, parts: int) -> tuple[Array, Array]:
    """Return each index's part, and its place there."""
    block = indices // block_numel
    return block % parts, block // parts * block_numel + indices % block_numel

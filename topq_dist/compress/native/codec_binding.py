"""The compiled kernels of codes as Python functions; topq_kernels.h has their contract.

Arrays are contiguous; TypeError for one that is not, or of a dtype that the others do not go with.
"""

from __future__ import annotations

from typing import Any

from topq_dist.compress.native import library
from topq_dist.compress.native.library import (
    FLOAT32,
    INT64,
    PAIR,
    UINT8,
    UINT16,
    Array,
    known,
    read,
    written,
)

_LIBRARY: Any = library.LIBRARY
_WRONG = {
    -2: "values do not take the bytes that they have",
    -3: "values end in bits that are not zero",
    -4: "a value is not finite",
}


def gaps_between(indices: Array, numel: int, gaps: Array) -> bool:
    """Write how many positions are skipped before each index; False unless they ascend in range."""
    dtype = gaps.dtype
    done: int = _LIBRARY.topq_gaps_between(
        dtype.itemsize, read(indices, INT64), indices.size, numel, written(gaps, dtype)
    )
    return bool(known(done, dtype))


def sums_of_quotients(gaps: Array, bits: int, sums: Array) -> None:
    """sums[i] = the sum of gaps >> bits + i."""
    dtype = gaps.dtype
    status: int = _LIBRARY.topq_sums_of_quotients(
        dtype.itemsize, read(gaps, dtype), gaps.size, bits, written(sums, INT64), sums.size
    )
    known(status, dtype)


def write_gaps(gaps: Array, bits: int, unary: Array, planes: Array, fields: Array) -> None:
    """Write gaps in Rice code; see topq_write_gaps."""
    dtype = gaps.dtype
    status: int = _LIBRARY.topq_write_gaps(
        dtype.itemsize,
        read(gaps, dtype),
        gaps.size,
        bits,
        written(unary, UINT8),
        written(planes, UINT8),
        written(fields, UINT8),
    )
    known(status, dtype)


def read_gaps(
    unary: Array, planes: Array, fields: Array, bits: int, indices: Array
) -> tuple[int, int]:
    """Undo write_gaps; return how many codes there are, at most one too many, and the last's bit.

    `unary` may be of any integers.
    """
    outcome = PAIR()
    status: int = _LIBRARY.topq_read_gaps(
        read(unary, unary.dtype),
        unary.nbytes,
        read(planes, UINT8),
        planes.size,
        read(fields, UINT8),
        fields.size,
        bits,
        written(indices, INT64),
        indices.size,
        outcome,
    )
    if known(status, UINT8):
        raise ValueError("Rice codes of indices past any vector, or that end too early")
    count, last_bit = outcome
    return count, last_bit


def round_to_half(numbers: Array, scale: Any, scaled: Array, bits: Array, halves: Array) -> None:
    """halves = the bits of fp16(numbers * scale), and scaled the products."""
    _LIBRARY.topq_round_to_half(
        read(numbers, FLOAT32),
        numbers.size,
        float(scale),
        written(scaled, FLOAT32),
        written(halves, UINT16),
    )


def widen_half(halves: Array, scale: Any, widened: Array, bits: Array) -> bool:
    """widened = fp32(halves) * scale; return False where a number is not finite."""
    return bool(
        _LIBRARY.topq_widen_half(
            read(halves, UINT16), halves.size, float(scale), written(widened, FLOAT32)
        )
    )


def split_halves(halves: Array, high: Array, low: Array, *, rotated: bool) -> None:
    """Write the bytes of numbers of two; rotated: of numbers turned left by one bit."""
    _LIBRARY.topq_split_halves(
        read(halves, UINT16), halves.size, rotated, written(high, UINT8), written(low, UINT8)
    )


def join_halves(high: Array, low: Array, halves: Array, *, rotated: bool) -> None:
    """Undo split_halves."""
    _LIBRARY.topq_join_halves(
        read(high, UINT8), read(low, UINT8), halves.size, rotated, written(halves, UINT16)
    )


def encode_blocks(
    values: Array, ks: Array, code_bits: int, scales: Array, packed: Array, decoded: Array
) -> None:
    """Write values in blocks of levels; see topq_encode_blocks."""
    status: int = _LIBRARY.topq_encode_blocks(
        read(values, FLOAT32),
        read(ks, INT64),
        ks.size,
        code_bits,
        written(scales, UINT8),
        written(packed, UINT8),
        written(decoded, FLOAT32),
    )
    known(status, UINT8)


def decode_blocks(payload: Array, ks: Array, code_bits: int, values: Array) -> None:
    """Undo encode_blocks; raise ValueError for a payload that is none of so many values."""
    status: int = _LIBRARY.topq_decode_blocks(
        read(payload, UINT8),
        payload.size,
        read(ks, INT64),
        ks.size,
        code_bits,
        written(values, FLOAT32),
        values.size,
    )
    if known(status, UINT8):
        raise ValueError(_WRONG[status])


def encode_levels(
    values: Array,
    ks: Array,
    ratio: float,
    bases: Array,
    steps: Array,
    signs: Array,
    levels: Array,
    decoded: Array,
) -> None:
    """Write values as signs and levels; see topq_encode_levels."""
    _LIBRARY.topq_encode_levels(
        read(values, FLOAT32),
        read(ks, INT64),
        ks.size,
        ratio,
        written(bases, UINT8),
        written(steps, UINT8),
        written(signs, UINT8),
        written(levels, UINT8),
        written(decoded, FLOAT32),
    )


def decode_levels(scales: Array, signs: Array, levels: Array, ks: Array, values: Array) -> None:
    """Undo encode_levels; raise ValueError for scales or signs that are none of so many values."""
    status: int = _LIBRARY.topq_decode_levels(
        read(scales, UINT8),
        scales.size,
        read(signs, UINT8),
        signs.size,
        read(levels, UINT8),
        read(ks, INT64),
        ks.size,
        written(values, FLOAT32),
        values.size,
    )
    if status:
        raise ValueError(_WRONG[status])


def write_symbols(levels: Array, scratch: Array, payload: Array) -> int:
    """Write numbers of a byte in entropy code; return how many bytes that took."""
    used: int = _LIBRARY.topq_write_symbols(
        read(levels, UINT8),
        levels.size,
        written(scratch, UINT8),
        written(payload, UINT8),
    )
    return used


def read_symbols(payload: Array, levels: Array) -> None:
    """Undo write_symbols; raise ValueError for a payload that is none of so many numbers."""
    status: int = _LIBRARY.topq_read_symbols(
        read(payload, UINT8), payload.size, written(levels, UINT8), levels.size
    )
    if status:
        raise ValueError(_WRONG[status])

"""The compiled kernels as Python functions; topq_kernels.h says what they do with which shapes.

Arrays are contiguous; TypeError for one that is not, or of a dtype that the others do not go with.
"""

from __future__ import annotations

from ctypes import c_int64
from typing import Any

import numpy as np

from topq_dist.compress.native import library
from topq_dist.compress.native.library import (
    FLOAT32,
    INT64,
    UINT8,
    UINT16,
    Array,
    read,
    written,
)

_LIBRARY: Any = library.LIBRARY
_Pair = c_int64 * 2


def find_reaching(
    vector: Array,
    residual: Array | None,
    low: Any,
    begin: int,
    indices: Array,
    numbers: Array,
    found: int,
    before: Array | None,
    added: Array | None,
) -> int:
    """List where the keys of vector + residual, or of a vector of integers, reach `low`."""
    dtype = vector.dtype
    residual_at = before_at = added_at = None
    _check_kind(dtype, "iu" if residual is None else "f")
    if residual is not None and before is not None and added is not None:
        residual_at, before_at = written(residual, dtype), written(before, dtype)
        added_at = written(added, INT64)
    elif residual is not None:
        residual_at = read(residual, dtype)
    count: int = _LIBRARY.topq_find_reaching(
        dtype.itemsize,
        read(vector, dtype),
        residual_at,
        vector.size,
        int(low),
        begin,
        written(indices, INT64),
        written(numbers, dtype),
        indices.size,
        found,
        before_at,
        added_at,
    )
    return _known(count, dtype)


def find_differing(ours: Array, theirs: Array, indices: Array) -> int:
    """List where two vectors of integers differ; return how many, -1 where `indices` is full."""
    dtype = ours.dtype
    _check_kind(dtype, "iu")
    count: int = _LIBRARY.topq_find_differing(
        dtype.itemsize,
        read(ours, dtype),
        read(theirs, dtype),
        ours.size,
        written(indices, INT64),
        indices.size,
    )
    return _known(count, dtype)


def keep_largest(
    indices: Array,
    bits: Array,
    magnitude: Any,
    k: int,
    counts: Array,
    near: Array,
    top: Array,
    top_bits: Array,
) -> tuple[int, int]:
    """Keep the k entries of largest magnitude; return the k-th and the highest."""
    dtype, outcome = bits.dtype, _Pair()
    _check_kind(dtype, "iu")
    status = _LIBRARY.topq_keep_largest(
        dtype.itemsize,
        read(indices, INT64),
        read(bits, dtype),
        bits.size,
        k,
        written(near, dtype),
        written(top, INT64),
        written(top_bits, dtype),
        outcome,
    )
    _known(status, dtype)
    kth, highest = outcome
    return kth, highest


def select_segments(
    vector: Array,
    residual: Array | None,
    begin: int,
    plan: Array,
    lows: Array,
    magnitude: Any,
    scratch: tuple[Array, ...],
    top: Array,
    top_bits: Array,
    outcomes: Array,
) -> None:
    """Keep the largest of each segment of vector + residual, or of a vector of integers."""
    indices, numbers, bits, near, _ = scratch
    dtype = vector.dtype
    _check_kind(dtype, "iu" if residual is None else "f")
    status = _LIBRARY.topq_select_segments(
        dtype.itemsize,
        read(vector, dtype),
        None if residual is None else read(residual, dtype),
        begin,
        read(plan, INT64),
        lows.size,
        read(lows, _SIGNED[dtype.itemsize]),
        written(indices, INT64),
        written(numbers, dtype),
        written(near, bits.dtype),
        written(top, INT64),
        written(top_bits, bits.dtype),
        written(outcomes, INT64),
    )
    _known(status, dtype)


def update_residual_span(
    residual: Array,
    gradient: Array,
    begin: int,
    indices: Array,
    rest: Array,
    replace: bool,
    terms: Array,
    summands: Array,
    next_term: Array,
    ends: Array,
) -> bool:
    """residual += gradient, then residual[indices - begin] = rest; see the header."""
    dtype = residual.dtype
    _check_kind(dtype, "f")
    done: int = _LIBRARY.topq_update_residual_span(
        dtype.itemsize,
        written(residual, dtype),
        written(gradient, dtype) if replace else read(gradient, dtype),
        residual.size,
        begin,
        read(indices, INT64),
        read(rest, dtype),
        indices.size,
        replace,
        read(terms, INT64),
        read(summands, dtype) if replace else None,
        written(next_term, INT64),
        read(ends, INT64),
        ends.size,
    )
    return bool(_known(done, dtype))


def sum_terms(
    terms: Array,
    summands: Array,
    next_term: Array,
    ends: Array,
    numel: int,
    window: Array,
    bits: Array,
    one: Any,
    indices: Array,
    numbers: Array,
) -> int:
    """List where the sum of sparse vectors is not zero, and its bits there; see topq_sum_terms."""
    dtype = summands.dtype
    _check_kind(dtype, "f")
    found: int = _LIBRARY.topq_sum_terms(
        dtype.itemsize,
        read(terms, INT64),
        read(summands, dtype),
        written(next_term, INT64),
        read(ends, INT64),
        ends.size,
        numel,
        written(window, dtype),
        window.size,
        written(indices, INT64),
        written(numbers, bits.dtype),
        indices.size,
    )
    return _known(found, dtype)


def scatter_add(out: Array, indices: Array, values: Array) -> bool:
    """out[indices] += values, one after the other; return False at the first out of range."""
    if not out.flags.c_contiguous:
        whole = np.ascontiguousarray(out)
        complete = scatter_add(whole, indices, values)
        out[...] = whole
        return complete
    dtype = out.dtype
    _check_kind(dtype, "f")
    indices, values = np.ascontiguousarray(indices), np.ascontiguousarray(values)
    done: int = _LIBRARY.topq_scatter_add(
        dtype.itemsize,
        written(out, dtype),
        out.size,
        read(indices, INT64),
        read(values, dtype),
        indices.size,
    )
    return bool(_known(done, dtype))


def gaps_between(indices: Array, numel: int, gaps: Array) -> bool:
    """Write how many positions are skipped before each index; False unless they ascend in range."""
    dtype = gaps.dtype
    done: int = _LIBRARY.topq_gaps_between(
        dtype.itemsize, read(indices, INT64), indices.size, numel, written(gaps, dtype)
    )
    return bool(_known(done, dtype))


def sum_of_quotients(gaps: Array, bits: int) -> int:
    """Return the sum of gaps >> bits."""
    dtype = gaps.dtype
    total: int = _LIBRARY.topq_sum_of_quotients(dtype.itemsize, read(gaps, dtype), gaps.size, bits)
    return _known(total, dtype)


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
    _known(status, dtype)


def read_gaps(
    unary: Array, planes: Array, fields: Array, bits: int, indices: Array
) -> tuple[int, int]:
    """Undo write_gaps; return how many codes there are, at most one too many, and the last's bit.

    `unary` may be of any integers.
    """
    outcome = _Pair()
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
    if _known(status, UINT8):
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
    _known(status, UINT8)


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
    if _known(status, UINT8):
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


def bound_rows(values: Array, ks: Array, row_numels: Array, bound: float, bounded: Array) -> None:
    """Clip each row's values to `bound` times their mean magnitude; see topq_bound_rows."""
    dtype = values.dtype
    _check_kind(dtype, "f")
    status: int = _LIBRARY.topq_bound_rows(
        dtype.itemsize,
        read(values, dtype),
        read(ks, INT64),
        read(row_numels, INT64),
        ks.size,
        bound,
        written(bounded, dtype),
    )
    _known(status, dtype)


def split_indices(
    indices: Array, block_numel: int, edges: Array, mine: Array, places: Array
) -> None:
    """Sort indices by the part that their block belongs to, in turn."""
    _LIBRARY.topq_split_indices(
        read(indices, INT64),
        indices.size,
        block_numel,
        written(edges, INT64),
        edges.size - 1,
        written(mine, INT64),
        written(places, INT64),
    )


def indices_of_part(places: Array, block_numel: int, count: int, part: int, indices: Array) -> None:
    """Write the indices in the vector of these places in one of `count` parts."""
    _LIBRARY.topq_indices_of_part(
        read(places, INT64), places.size, block_numel, count, part, written(indices, INT64)
    )


def gather_tensors(addresses: Array, edges_bytes: Array, flat: Array) -> None:
    """Copy tensors at these addresses one behind the other into `flat`, of any dtype."""
    _LIBRARY.topq_gather_tensors(
        read(addresses, INT64),
        read(edges_bytes, INT64),
        addresses.size,
        written(flat, flat.dtype),
    )


def scatter_to_tensors(addresses: Array, edges: Array, flat: Array, indices: Array) -> bool:
    """Copy what lies at ascending indices of `flat` to tensors; False for one out of range."""
    done: int = _LIBRARY.topq_scatter_to_tensors(
        flat.itemsize,
        read(addresses, INT64),
        read(edges, INT64),
        addresses.size,
        read(flat, flat.dtype),
        read(indices, INT64),
        indices.size,
    )
    return bool(_known(done, flat.dtype))


_UNKNOWN = -9
_WRONG = {
    -2: "values do not take the bytes that they have",
    -3: "values end in bits that are not zero",
    -4: "a value is not finite",
}
_SIGNED = {size: np.dtype(f"i{size}") for size in (2, 4, 8)}


def _check_kind(dtype: np.dtype[Any], kinds: str) -> None:
    if dtype.kind not in kinds:
        raise TypeError(f"an array of {dtype}: expected one of kind {' or '.join(kinds)}")


def _known(status: int, dtype: np.dtype[Any]) -> int:
    if status == _UNKNOWN:
        raise TypeError(f"an array of {dtype}: there is no kernel for its width")
    return status

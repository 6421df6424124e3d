"""The compiled kernels of whole vectors as Python functions; topq_kernels.h has their contract.

Arrays are contiguous; TypeError for one that is not, or of a dtype that the others do not go with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from topq_dist.compress.native import library
from topq_dist.compress.native.library import (
    INT64,
    PAIR,
    Array,
    addresses,
    check_kind,
    known,
    read,
    written,
)

_LIBRARY: Any = library.LIBRARY
_SIGNED = {size: np.dtype(f"i{size}") for size in (2, 4, 8)}


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
    check_kind(dtype, "iu" if residual is None else "f")
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
    return known(count, dtype)


def find_differing(ours: Array, theirs: Array, indices: Array) -> int:
    """List where two vectors of integers differ; return how many, -1 where `indices` is full."""
    dtype = ours.dtype
    check_kind(dtype, "iu")
    count: int = _LIBRARY.topq_find_differing(
        dtype.itemsize,
        read(ours, dtype),
        read(theirs, dtype),
        ours.size,
        written(indices, INT64),
        indices.size,
    )
    return known(count, dtype)


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
    dtype, outcome = bits.dtype, PAIR()
    check_kind(dtype, "iu")
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
    known(status, dtype)
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
    check_kind(dtype, "iu" if residual is None else "f")
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
    known(status, dtype)


def update_residual_span(
    residual: Array,
    gradient: Array,
    begin: int,
    indices: Array,
    rest: Array,
    replace: bool,
    terms: Sequence[Array],
    summands: Sequence[Array],
    next_term: Array,
    ends: Array,
) -> bool:
    """residual += gradient, then residual[indices - begin] = rest; see the header."""
    dtype = residual.dtype
    check_kind(dtype, "f")
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
        addresses(terms, INT64),
        addresses(summands, dtype),
        written(next_term, INT64),
        read(ends, INT64),
        ends.size,
    )
    return bool(known(done, dtype))


def sum_terms(
    terms: Sequence[Array],
    summands: Sequence[Array],
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
    dtype = window.dtype
    check_kind(dtype, "f")
    found: int = _LIBRARY.topq_sum_terms(
        dtype.itemsize,
        addresses(terms, INT64),
        addresses(summands, dtype),
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
    return known(found, dtype)


def scatter_add(out: Array, indices: Array, values: Array) -> bool:
    """out[indices] += values, one after the other; return False at the first out of range."""
    if not out.flags.c_contiguous:
        whole = np.ascontiguousarray(out)
        complete = scatter_add(whole, indices, values)
        out[...] = whole
        return complete
    dtype = out.dtype
    check_kind(dtype, "f")
    indices, values = np.ascontiguousarray(indices), np.ascontiguousarray(values)
    done: int = _LIBRARY.topq_scatter_add(
        dtype.itemsize,
        written(out, dtype),
        out.size,
        read(indices, INT64),
        read(values, dtype),
        indices.size,
    )
    return bool(known(done, dtype))


def bound_rows(values: Array, ks: Array, row_numels: Array, bound: float, bounded: Array) -> None:
    """Clip each row's values to `bound` times their mean magnitude; see topq_bound_rows."""
    dtype = values.dtype
    check_kind(dtype, "f")
    status: int = _LIBRARY.topq_bound_rows(
        dtype.itemsize,
        read(values, dtype),
        read(ks, INT64),
        read(row_numels, INT64),
        ks.size,
        bound,
        written(bounded, dtype),
    )
    known(status, dtype)


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
    return bool(known(done, flat.dtype))

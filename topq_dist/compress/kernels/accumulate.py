"""The loops that add up: residuals, and the sums of sparse vectors; see select.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from topq_dist.compress.kernels.jit import compiled
from topq_dist.compress.kernels.select import find_reaching
from topq_dist.compress.native import binding

# elements updated in one go: both vectors' stay in a core's first cache
_UPDATED_NUMEL = 2_048


@njit
def _add_terms(out: Any, begin: Any, terms: Any, summands: Any, next_term: Any, ends: Any) -> None:
    """Add to `out`, which begins at `begin`, what comes next of each sparse vector and lies in it.

    out: (n,) floats. begin: int, the index of out[0]. The others are as in update_residual_span.
    """
    size = np.uint64(out.size)
    for one in range(ends.size):
        at = next_term[one]
        while at < ends[one]:
            place = np.uint64(terms[at] - begin)
            if place >= size:
                break
            out[place] += summands[at]
            at += 1
        next_term[one] = at


@njit
def _at_ends(next_term: Any, ends: Any) -> Any:
    """Return whether every sparse vector has been added up, no term out of order or range."""
    complete = True
    for one in range(ends.size):
        complete &= next_term[one] == ends[one]
    return complete


@compiled
def update_residual_span(
    residual: Any,
    gradient: Any,
    begin: Any,
    indices: Any,
    rest: Any,
    replace: Any,
    terms: Any,
    summands: Any,
    next_term: Any,
    ends: Any,
) -> Any:
    """residual += gradient, then residual[indices - begin] = rest.

    residual, gradient: (n,) floats of one dtype. begin: int, the index of residual[0].
    indices: int64 (k,), ascending. rest: (k,) like residual.
    replace: bool; where true the gradient becomes zero, and then gradient[terms - begin] +=
        summands, for what comes next of each of some sparse vectors.
    terms: int64 (t,), the indices of one sparse vector after the other, ascending in each.
    summands: (t,) like gradient. next_term, ends: int64 (vectors,), where in terms the rest of each
        vector begins, which moves on, and where it ends.
    Returns False where an index or term is out of range: nothing is written there.
    """
    written = 0
    for start in range(0, residual.size, _UPDATED_NUMEL):
        # indices that count from 0 are known not to be negative, which vector code needs
        left = residual[start : start + _UPDATED_NUMEL]
        more = gradient[start : start + _UPDATED_NUMEL]
        for at in range(left.size):
            left[at] += more[at]
        size = np.uint64(left.size)
        while written < indices.size:
            place = np.uint64(indices[written] - begin - start)
            if place >= size:
                break
            left[place] = rest[written]
            written += 1
        if replace:
            more[:] = 0
            _add_terms(more, begin + start, terms, summands, next_term, ends)
    return written == indices.size and _at_ends(next_term, ends)


@compiled
def sum_terms(
    terms: Any,
    summands: Any,
    next_term: Any,
    ends: Any,
    numel: Any,
    window: Any,
    bits: Any,
    one: Any,
    indices: Any,
    numbers: Any,
) -> Any:
    """List where the sum of sparse vectors of `numel` elements is not zero, and its bits there.

    terms, summands, next_term, ends: as in update_residual_span. numel: int.
    window: (w,) like summands, scratch of any size. bits: (w,) signed integers, the same memory.
    one: 1 in bits' dtype. indices: int64 (t + LANES,). numbers: (t + LANES,) of bits' dtype.
    Returns how many these two hold, or -1 where a term is out of range, or comes after that of a
    later window.
    """
    found = 0
    for start in range(0, numel, window.size):
        part = window[: min(window.size, numel - start)]
        part[:] = 0
        _add_terms(part, start, terms, summands, next_term, ends)
        found = find_reaching(
            bits[: part.size], None, one, start, indices, numbers, found, None, None
        )
    return found if _at_ends(next_term, ends) else -1


@compiled
def scatter_add(out: Any, indices: Any, values: Any) -> Any:
    """out[indices] += values, one after the other; returns False at the first out of range.

    out: (n,) floats. indices: int64 (k,). values: (k,) like out.
    """
    size = np.uint64(out.size)
    for at in range(indices.size):
        # below zero is far above any size then, and no Python index that counts from the end
        place = np.uint64(indices[at])
        if place >= size:
            return False
        out[place] += values[at]
    return True


# where the library is there; else numba's stay
globals().update(binding.kernels("scatter_add", "update_residual_span", "sum_terms"))

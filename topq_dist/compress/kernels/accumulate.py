"""The loops that add up: what is owed, and the sums of sparse vectors; see select.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from topq_dist.compress.kernels.jit import compiled
from topq_dist.compress.kernels.select import find_reaching

# elements settled in one go: both vectors' stay in a core's first cache
_SETTLED = 2_048


@njit
def _add_terms(out: Any, begin: Any, terms: Any, summands: Any, next_term: Any, ends: Any) -> None:
    """Add to `out`, which begins at `begin`, what comes next in each stretch and lies in it."""
    size = np.uint64(out.size)
    for stretch in range(ends.size):
        at = next_term[stretch]
        while at < ends[stretch]:
            place = np.uint64(terms[at] - begin)
            if place >= size:
                break
            out[place] += summands[at]
            at += 1
        next_term[stretch] = at


@njit
def _at_ends(next_term: Any, ends: Any) -> Any:
    """Return whether every stretch of terms has been added up, none left out of order or range."""
    complete = True
    for stretch in range(ends.size):
        complete &= next_term[stretch] == ends[stretch]
    return complete


@compiled
def settle_span(
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

    With `replace` the gradient becomes zero, and gradient[terms - begin] += summands, a stretch
    of them from each of `next_term` to that of `ends`. The indices ascend, and the terms in a
    stretch. Returns False where one of them, less begin, is out of range: nothing is written there.
    """
    written = 0
    for start in range(0, residual.size, _SETTLED):
        # indices that count from 0 are known not to be negative, which vector code needs
        owed = residual[start : start + _SETTLED]
        more = gradient[start : start + _SETTLED]
        for at in range(owed.size):
            owed[at] += more[at]
        size = np.uint64(owed.size)
        while written < indices.size:
            place = np.uint64(indices[written] - begin - start)
            if place >= size:
                break
            owed[place] = rest[written]
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

    Terms and so on are as for settle_span. `window` is scratch of any size, `bits` the same memory
    as integers, of which `one` is 1; `indices` and `numbers` have room for all terms and LANES
    more. Returns how many they hold, or -1 where an index is out of range, or comes after that of a
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
    """out[indices] += values, one after the other; returns False at the first out of range."""
    size = np.uint64(out.size)
    for at in range(indices.size):
        # below zero is far above any size then, and no Python index that counts from the end
        place = np.uint64(indices[at])
        if place >= size:
            return False
        out[place] += values[at]
    return True

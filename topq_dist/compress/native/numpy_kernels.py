"""The kernels in numpy, for where there is no library: the same numbers to the bit, but slower.

Arguments, results and what is written are those of the functions of the same names in binding.py;
scratch that numpy has no use for is left alone. They are what the tests compare the library with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
F = TypeVar("F", bound=Callable[..., Any])

# elements that are looked at, and that are updated, at a time
_LANES = 64
_UPDATED = 2_048


def quiet(function: F) -> F:
    """Have sums be infinite or NaN without a word, as in C."""

    @wraps(function)
    def call(*args: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(*args)

    return cast("F", call)


@quiet
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
    if residual is None:
        listed = vector
    elif before is None or added is None:
        listed = vector + residual
    else:
        before[: residual.size] = residual
        # counted first: where this is interrupted in between, undoing changes nothing
        added[0] += vector.size
        listed = np.add(residual, vector, out=residual)
    signed = listed.view(f"i{listed.itemsize}")
    reached = np.flatnonzero((signed & np.iinfo(signed.dtype).max) >= low)
    # those of a block are listed together
    block = reached // _LANES
    before_block = found + np.searchsorted(block, block)
    count = int(np.count_nonzero(before_block <= indices.size - _LANES))
    indices[found : found + count] = reached[:count] + begin
    numbers[found : found + count] = listed[reached[:count]]
    return found + count


def find_differing(ours: Array, theirs: Array, indices: Array) -> int:
    """List where two vectors of integers differ; return how many, -1 where `indices` is full."""
    differing = np.flatnonzero(ours != theirs)
    if differing.size > indices.size:
        return -1
    indices[: differing.size] = differing
    return differing.size


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
    keys = bits & magnitude
    kth = np.partition(keys, keys.size - k)[keys.size - k]
    chosen = keys > kth
    tied = np.flatnonzero(keys == kth)
    chosen[tied[: k - np.count_nonzero(chosen)]] = True
    top[:k], top_bits[:k] = indices[chosen], bits[chosen]
    return int(kth), int(keys.max())


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
    indices, numbers, bits, near, counts = scratch
    filled = 0
    for at, (start, stop, k, limit) in enumerate(plan.tolist()):
        room = min(limit, stop - start) + 1 + _LANES
        found = find_reaching(
            vector[start:stop],
            None if residual is None else residual[start:stop],
            lows[at],
            begin + start,
            indices[:room],
            numbers,
            0,
            None,
            None,
        )
        outcomes[at, 0] = found
        if 0 < k <= found <= limit:
            outcomes[at, 1:] = keep_largest(
                indices[:found],
                bits[:found],
                magnitude,
                k,
                counts,
                near,
                top[filled:],
                top_bits[filled:],
            )
        filled += k


@quiet
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
    """residual += gradient, then residual[indices - begin] = rest."""
    residual += gradient
    places = indices - begin
    count = _in_order(places, residual.size, _UPDATED)
    residual[places[:count]] = rest[:count]
    if replace:
        gradient[:] = 0
        for at, part in enumerate(_slices(next_term, ends)):
            places = terms[at][part] - begin
            added = _in_order(places, gradient.size, _UPDATED)
            np.add.at(gradient, places[:added], summands[at][part][:added])
            next_term[at] += added
    return count == indices.size and bool((next_term == ends).all())


@quiet
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
    """List where the sum of sparse vectors is not zero, and its bits there."""
    slices = _slices(next_term, ends)
    lists = [one[part] for one, part in zip(terms, slices, strict=True)]
    if any(_in_order(one, numel, window.size) < one.size for one in lists):
        return -1
    next_term[:] = ends
    places = np.unique(np.concatenate([np.zeros(0, np.int64), *lists]))
    sums = np.zeros(places.size, window.dtype)
    for one, numbers_of_one, part in zip(lists, summands, slices, strict=True):
        np.add.at(sums, np.searchsorted(places, one), numbers_of_one[part])
    (nonzero,) = sums.nonzero()
    indices[: nonzero.size] = places[nonzero]
    numbers[: nonzero.size] = sums[nonzero].view(numbers.dtype)
    return nonzero.size


@quiet
def scatter_add(out: Array, indices: Array, values: Array) -> bool:
    """out[indices] += values, one after the other; return False at the first out of range."""
    outside = np.flatnonzero((indices < 0) | (indices >= out.size))
    count = outside[0] if outside.size else indices.size
    np.add.at(out, indices[:count], values[:count])
    return not outside.size


def split_indices(
    indices: Array, block_numel: int, edges: Array, mine: Array, places: Array
) -> None:
    """Sort indices by the part that their block belongs to, in turn."""
    parts = edges.size - 1
    rounds, owner = np.divmod(indices // block_numel, parts)
    edges[1:] = np.cumsum(np.bincount(owner, minlength=parts))
    mine[:] = np.argsort(owner, kind="stable")
    places[:] = (rounds * block_numel + indices % block_numel)[mine]


def indices_of_part(places: Array, block_numel: int, count: int, part: int, indices: Array) -> None:
    """Write the indices in the vector of these places in one of `count` parts."""
    rounds = places // block_numel
    indices[:] = places + (rounds * (count - 1) + part) * block_numel


def _slices(next_term: Array, ends: Array) -> list[slice]:
    return [slice(*span) for span in zip(next_term.tolist(), ends.tolist(), strict=True)]


def _in_order(places: Array, numel: int, window: int) -> int:
    """Return how many come before the first that is out of range, or in an earlier window."""
    windows = places // window
    wrong = (places < 0) | (places >= numel)
    wrong[1:] |= windows[1:] < windows[:-1]
    return int(wrong.argmax()) if wrong.any() else places.size

"""The loops over whole gradients, at the speed of memory, compiled by numba on first use.

Whole-array operations pass over a vector once for every thing they do to it; these pass once for
all. They run without Python's lock. Nothing here checks its arguments: callers do, and where what
came over a wire decides where to read or write, the loop itself looks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from topq_dist.compress.kernels.jit import (
    LANES,
    compiled,
    count_bits,
    differing_64,
    differing_one,
    lowest_bit,
    reached_by_64,
    reached_by_one,
)
from topq_dist.compress.native import binding


@njit
def _number(vector: Any, residual: Any, before: Any, at: Any) -> Any:
    if residual is None:
        return vector[at]
    # with `before` it has been added already
    return vector[at] + residual[at] if before is None else residual[at]


@compiled
def find_reaching(
    vector: Any,
    residual: Any,
    low: Any,
    begin: Any,
    indices: Any,
    numbers: Any,
    found: Any,
    before: Any,
    added: Any,
) -> Any:
    """List where the keys of vector + residual, or of vector, reach `low`; return how many do.

    vector: (n,) floats of the sum's dtype, or without `residual` signed integers of their size.
    residual: None, or (n,) floats like vector. low: signed integer of their size, a key.
    begin: int, the index of vector[0]; listed indices count from it.
    indices: int64 (room,). numbers: (room,) of vector's dtype. The first `found` (int) entries of
        both stay; no more are listed where fewer than LANES are free.
    before: None, or (n,) like residual, at an address that STREAM_ALIGNMENT divides: then residual
        += vector in any case, and `before` becomes what residual was.
    added: None, or with `before` int64 (1,), which grows by n.
    """
    room = indices.size - LANES
    whole = vector.size // LANES * LANES
    for block in range(0, whole, LANES):
        mask = reached_by_64(vector, residual, before, block, low)
        if found > room:
            if before is None:
                return found
            continue
        count = np.int64(count_bits(mask))
        # two are written whether they count or not: where one in a hundred does, a loop that ends
        # after none, one or two costs more than they do
        for entry in range(2):
            at = block + lowest_bit(mask)
            indices[found + entry] = begin + at
            numbers[found + entry] = _number(vector, residual, before, at)
            mask &= mask - np.uint64(1)
        entry = found + 2
        found += count
        while entry < found:
            at = block + lowest_bit(mask)
            indices[entry] = begin + at
            numbers[entry] = _number(vector, residual, before, at)
            mask &= mask - np.uint64(1)
            entry += 1
    for at in range(whole, vector.size):
        if reached_by_one(vector, residual, before, at, low) != 0:
            if found > room:
                if before is None:
                    return found
                continue
            indices[found] = begin + at
            numbers[found] = _number(vector, residual, before, at)
            found += 1
    if before is not None:
        # here, since what interrupts Python does so only once this has returned
        added[0] += vector.size
    return found


@compiled
def find_differing(ours: Any, theirs: Any, indices: Any) -> Any:
    """List where two vectors differ; return how many times, or -1 where `indices` is full.

    ours, theirs: (n,) signed integers of one dtype. indices: int64 (room,).
    """
    found = 0
    whole = ours.size // LANES * LANES
    for block in range(0, whole, LANES):
        mask = differing_64(ours, theirs, block)
        if found + np.int64(count_bits(mask)) > indices.size:
            return -1
        while mask != 0:
            indices[found] = block + lowest_bit(mask)
            found += 1
            mask &= mask - np.uint64(1)
    for at in range(whole, ours.size):
        if differing_one(ours, theirs, at) != 0:
            if found == indices.size:
                return -1
            indices[found] = at
            found += 1
    return found


@compiled
def keep_largest(
    indices: Any,
    bits: Any,
    magnitude: Any,
    k: Any,
    counts: Any,
    near: Any,
    top: Any,
    top_bits: Any,
) -> Any:
    """Keep the k entries of largest magnitude, the first ones of those that tie at the k-th place.

    indices: int64 (n,). bits: (n,) unsigned integers, the numbers' bit patterns. magnitude: the
    mask of bits' dtype that clears the sign. k: int in [1, n].
    counts: int64, scratch of any size. near: (n,) of bits' dtype, scratch.
    top: int64 (k + 1,) and top_bits: (k + 1,) of bits' dtype, whose first k become the entries.
    Returns the k-th and the highest magnitude, int64.
    """
    # with the sign bit cleared even 64 bits are an int64, which, unlike uint64, adds to integers
    lowest = highest = np.int64(bits[0] & magnitude)
    for at in range(bits.size):
        key = np.int64(bits[at] & magnitude)
        lowest, highest = min(lowest, key), max(highest, key)
    # the k-th lies in one of as many narrow ranges as there are counts
    shift = 0
    while (highest - lowest) >> shift >= counts.size:
        shift += 1
    counts[:] = 0
    for at in range(bits.size):
        counts[(np.int64(bits[at] & magnitude) - lowest) >> shift] += 1
    bucket, above = counts.size - 1, 0
    while above + counts[bucket] < k:
        above += counts[bucket]
        bucket -= 1
    found = 0
    for at in range(bits.size):
        key = bits[at] & magnitude
        near[found] = key
        found += ((np.int64(key) - lowest) >> shift) == bucket
    place = found - (k - above)
    kth = np.partition(near[:found], place)[place]
    ties_left = k - above
    for at in range(found):
        ties_left -= near[at] > kth
    count = 0
    for at in range(bits.size):
        pattern = bits[at]
        key = pattern & magnitude
        # written whether it counts or not: a branch that is taken now and then costs more
        top[count] = indices[at]
        top_bits[count] = pattern
        tied = (key == kth) & (ties_left > 0)
        ties_left -= tied
        count += (key > kth) | tied
    return np.int64(kth), highest


def _slice_of(residual: Any, start: Any, stop: Any) -> Any:
    raise NotImplementedError("for compiled code only")


@overload(_slice_of, strict=False)
def _typed_slice_of(residual: Any, start: Any, stop: Any) -> Any:
    # a branch within one function would make it an optional array
    if residual is types.none:
        return lambda residual, start, stop: None
    return lambda residual, start, stop: residual[start:stop]


@compiled
def select_segments(
    vector: Any,
    residual: Any,
    begin: Any,
    plan: Any,
    lows: Any,
    magnitude: Any,
    scratch: Any,
    top: Any,
    top_bits: Any,
    outcomes: Any,
) -> None:
    """Keep the largest of each segment of vector + residual, or of vector, as keep_largest does.

    vector, residual, begin, magnitude: as in find_reaching and keep_largest.
    plan: int64 (segments, 4), of each its start and end in vector, its k, and how many candidates
        are worth having. lows: (segments,) signed integers, the key that they reach.
    scratch: what find_reaching and keep_largest need: indices, numbers, the same memory as bits,
        near and counts.
    top, top_bits: as in keep_largest, for the sum of all k and one more. A segment's k places are
        left as they are where fewer than k candidates reach its key, or too many.
    outcomes: int64 (segments, 3), becomes how many reach the key, the k-th key and the highest.
    """
    indices, numbers, bits, near, counts = scratch
    first = 0
    for at in range(plan.shape[0]):
        start, stop, k, limit = plan[at]
        room = min(limit, stop - start) + 1 + LANES
        found = find_reaching(
            vector[start:stop],
            _slice_of(residual, start, stop),
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
            kth, highest = keep_largest(
                indices[:found],
                bits[:found],
                magnitude,
                k,
                counts,
                near,
                top[first:],
                top_bits[first:],
            )
            outcomes[at, 1], outcomes[at, 2] = kth, highest
        first += k


# where the library is there; else numba's stay
globals().update(
    binding.kernels("find_differing", "find_reaching", "keep_largest", "select_segments")
)

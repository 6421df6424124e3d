"""The loops that run at the speed of memory, compiled by numba on first use.

Whole-array operations pass over a vector once for every thing they do to it; these pass once for
all. They run without Python's lock. Nothing here checks its arguments: callers do, and where what
came over a wire decides where to read or write, the loop itself looks.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

F = TypeVar("F", bound=Callable[..., Any])

# elements whose bits are looked at together: as many as a mask of one word holds
LANES = 64
# what divides the address of memory that is written past the caches
STREAM_ALIGNMENT = 64
# elements settled in one go: both vectors' stay in a core's first cache
_SETTLED = 2_048


def compiled(function: F) -> F:
    """Return `function` as machine code, kept beside it or in the user's cache where there is one.

    The cache is renewed when this file changes, and no other: what kernels call lives here too.
    """
    try:
        kernel: F = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba found no folder that it may write to
        kernel = njit(nogil=True)(function)
    else:
        _renew_where_damaged(kernel)
    return kernel


def _renew_where_damaged(kernel: Any) -> None:
    """Make a cache file that cannot be read count as none: a power cut leaves empty ones."""
    cache = kernel._cache
    load = cache.load_overload

    def load_or_nothing(*args: Any) -> Any:
        try:
            return load(*args)
        except (EOFError, pickle.UnpicklingError):
            cache.flush()
            return None

    cache.load_overload = load_or_nothing


def _mask_of(lanes: int) -> Any:
    """Return an intrinsic: which of `lanes` elements from `at` on reach the key `low`, as bits.

    An element is first[at], or the sum with second[at]; its key are its bits without the sign. With
    `before` the sum is written to `second`, and what was there to `before`.
    """

    @intrinsic
    def mask(_: Any, first: Any, second: Any, before: Any, at: Any, low: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
            place = args[3]
            bits = _load(context, builder, first, args[0], place, lanes)
            width = first.dtype.bitwidth
            keys = ir.VectorType(ir.IntType(width), lanes)
            if second is not types.none:
                owed = _load(context, builder, second, args[1], place, lanes)
                bits = builder.fadd(bits, owed)
                if before is not types.none:
                    _store(context, builder, second, args[1], place, bits)
                    _store(context, builder, before, args[2], place, owed, streaming=lanes == LANES)
                bits = builder.bitcast(bits, keys)
            magnitudes = builder.and_(bits, ir.Constant(keys, [(1 << (width - 1)) - 1] * lanes))
            reached = builder.icmp_signed(">=", magnitudes, _spread(builder, args[4], keys))
            return _word(builder, reached, lanes)

        return types.uint64(first, second, before, at, low), generate

    return mask


def _differing_of(lanes: int) -> Any:
    """Return an intrinsic: in which of `lanes` integers from `at` on vectors differ, as bits."""

    @intrinsic
    def differing(_: Any, first: Any, second: Any, at: Any) -> Any:
        def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
            ours = _load(context, builder, first, args[0], args[2], lanes)
            theirs = _load(context, builder, second, args[1], args[2], lanes)
            return _word(builder, builder.icmp_signed("!=", ours, theirs), lanes)

        return types.uint64(first, second, at), generate

    return differing


def _load(context: Any, builder: Any, array_type: Any, array: Any, at: Any, lanes: int) -> Any:
    vector = ir.VectorType(context.get_data_type(array_type.dtype), lanes)
    address = _address(context, builder, array_type, array, at, vector)
    return builder.load(address, align=array_type.dtype.bitwidth // 8)


def _store(
    context: Any,
    builder: Any,
    array_type: Any,
    array: Any,
    at: Any,
    value: Any,
    streaming: bool = False,
) -> None:
    """Write a vector; `streaming` past the caches, to an address that STREAM_ALIGNMENT divides."""
    address = _address(context, builder, array_type, array, at, value.type)
    align = STREAM_ALIGNMENT if streaming else array_type.dtype.bitwidth // 8
    store = builder.store(value, address, align=align)
    if streaming:
        # or each line would be read first, which costs as much as the read of a gradient
        once = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        store.set_metadata("nontemporal", once)


def _address(context: Any, builder: Any, array_type: Any, array: Any, at: Any, vector: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), vector.as_pointer())


def _spread(builder: Any, scalar: Any, vector: Any) -> Any:
    places = ir.VectorType(ir.IntType(32), vector.count)
    unset = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(unset, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, unset, ir.Constant(places, [0] * vector.count))


def _word(builder: Any, flags: Any, lanes: int) -> Any:
    word = builder.bitcast(flags, ir.IntType(lanes))
    return word if lanes == LANES else builder.zext(word, ir.IntType(LANES))


@intrinsic
def _lowest_bit(_: Any, word: Any) -> Any:
    """Return the place of the lowest bit that is set, in [0, LANES); of none, any in that range."""

    def generate(_: Any, builder: Any, _signature: Any, args: Any) -> Any:
        place = builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))
        return builder.and_(place, ir.Constant(ir.IntType(64), LANES - 1))

    return types.int64(types.uint64), generate


@intrinsic
def _count_bits(_: Any, word: Any) -> Any:
    def generate(_: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), generate


_reached_by_64, _reached_by_one = _mask_of(LANES), _mask_of(1)
_differing_64, _differing_one = _differing_of(LANES), _differing_of(1)


@njit
def _number(vector: Any, owed: Any, before: Any, at: Any) -> Any:
    if owed is None:
        return vector[at]
    # with `before` it has been added already
    return vector[at] + owed[at] if before is None else owed[at]


@compiled
def count_reaching(vector: Any, low: Any) -> Any:
    """Return how many integers of `vector`, their sign bits cleared, are `low` or more."""
    count = np.uint64(0)
    whole = vector.size // LANES * LANES
    for at in range(0, whole, LANES):
        count += _count_bits(_reached_by_64(vector, None, None, at, low))
    for at in range(whole, vector.size):
        count += _reached_by_one(vector, None, None, at, low)
    return np.int64(count)


@compiled
def find_reaching(
    vector: Any,
    owed: Any,
    low: Any,
    begin: Any,
    indices: Any,
    numbers: Any,
    found: Any,
    before: Any,
) -> Any:
    """List where the keys of vector + owed (floats), or of vector (integers), reach `low`.

    Goes on behind the `found` entries that `indices` and `numbers` hold, counting from `begin`, and
    returns how many they hold then; lists no more where fewer than LANES entries are free. With
    `before`, of owed's kind and STREAM_ALIGNMENT, owed += vector in any case, and `before` is what
    owed was.
    """
    room = indices.size - LANES
    whole = vector.size // LANES * LANES
    for block in range(0, whole, LANES):
        mask = _reached_by_64(vector, owed, before, block, low)
        if found > room:
            if before is None:
                return found
            continue
        count = np.int64(_count_bits(mask))
        # two are written whether they count or not: where one in a hundred does, a loop that ends
        # after none, one or two costs more than they do
        for entry in range(2):
            at = block + _lowest_bit(mask)
            indices[found + entry] = begin + at
            numbers[found + entry] = _number(vector, owed, before, at)
            mask &= mask - np.uint64(1)
        entry = found + 2
        found += count
        while entry < found:
            at = block + _lowest_bit(mask)
            indices[entry] = begin + at
            numbers[entry] = _number(vector, owed, before, at)
            mask &= mask - np.uint64(1)
            entry += 1
    for at in range(whole, vector.size):
        if _reached_by_one(vector, owed, before, at, low) != 0:
            if found > room:
                if before is None:
                    return found
                continue
            indices[found] = begin + at
            numbers[found] = _number(vector, owed, before, at)
            found += 1
    return found


@compiled
def find_differing(ours: Any, theirs: Any, indices: Any) -> Any:
    """List where two vectors of integers differ; return how many, or -1 where `indices` is full."""
    found = 0
    whole = ours.size // LANES * LANES
    for block in range(0, whole, LANES):
        mask = _differing_64(ours, theirs, block)
        if found + np.int64(_count_bits(mask)) > indices.size:
            return -1
        while mask != 0:
            indices[found] = block + _lowest_bit(mask)
            found += 1
            mask &= mask - np.uint64(1)
    for at in range(whole, ours.size):
        if _differing_one(ours, theirs, at) != 0:
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
    kept: Any,
    kept_bits: Any,
) -> Any:
    """Keep the k entries of largest magnitude, the first ones of those that tie at the k-th place.

    Writes them to `kept` and `kept_bits`, which have room for one more; returns the k-th and the
    highest magnitude. `near` has room for all bits and one more; `counts` is scratch of any size.
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
    ties = k - above
    for at in range(found):
        ties -= near[at] > kth
    count = 0
    for at in range(bits.size):
        pattern = bits[at]
        key = pattern & magnitude
        # written whether it counts or not: a branch that is taken now and then costs more
        kept[count] = indices[at]
        kept_bits[count] = pattern
        tied = (key == kth) & (ties > 0)
        ties -= tied
        count += (key > kth) | tied
    return np.int64(kth), highest


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
    at_term: Any,
    ends: Any,
) -> Any:
    """residual += gradient, then residual[indices - begin] = rest.

    With `replace` the gradient becomes zero, and gradient[terms - begin] += summands, a stretch
    of them from each of `at_term` to that of `ends`. The indices ascend, and the terms in a
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
            for stretch in range(ends.size):
                at = at_term[stretch]
                while at < ends[stretch]:
                    place = np.uint64(terms[at] - begin - start)
                    if place >= size:
                        break
                    more[place] += summands[at]
                    at += 1
                at_term[stretch] = at
    complete = written == indices.size
    for stretch in range(ends.size):
        complete &= at_term[stretch] == ends[stretch]
    return complete


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


@compiled
def gaps_between(indices: Any, numel: Any, gaps: Any) -> Any:
    """Write how many positions are skipped before each index; False unless they ascend in range."""
    previous = -1
    for at in range(indices.size):
        index = indices[at]
        if index <= previous or index >= numel:
            return False
        gaps[at] = index - previous - 1
        previous = index
    return True


@compiled
def sum_of_quotients(gaps: Any, bits: Any) -> Any:
    """Return the sum of gaps >> bits, which may be over an int32."""
    total = np.int64(0)
    for at in range(gaps.size):
        total += gaps[at] >> bits
    return total


@compiled
def write_gaps(gaps: Any, bits: Any, unary: Any, planes: Any, fields: Any) -> None:
    """Write gaps in Rice code: quotients in unary, whole low bytes, the rest in fields of bits % 8.

    All three outputs begin as zeros and have room; `planes` is (bits // 8, k).
    """
    at_bit = -1
    whole, width = bits // 8, bits % 8
    held, filled, at_byte = 0, 0, 0
    for at in range(gaps.size):
        gap = gaps[at]
        at_bit += (gap >> bits) + 1
        unary[at_bit >> 3] |= np.uint8(1 << (at_bit & 7))
        for plane in range(whole):
            planes[plane, at] = (gap >> (8 * plane)) & 255
        if width:
            held |= ((gap >> (8 * whole)) & ((1 << width) - 1)) << filled
            filled += width
            if filled >= 8:
                fields[at_byte] = held & 255
                at_byte += 1
                held >>= 8
                filled -= 8
    if filled:
        fields[at_byte] = held & 255


@compiled
def read_gaps(unary: Any, planes: Any, fields: Any, bits: Any, indices: Any) -> Any:
    """Undo write_gaps, into ascending indices; `unary` comes as uint64 words, bit 0 first.

    Returns (how many codes there are, the last one's bit); reads no more than indices.size.
    """
    whole, width = bits // 8, bits % 8
    held, filled, at_byte = 0, 0, 0
    found, last_bit, index = 0, -1, -1
    for at_word in range(unary.size):
        word = unary[at_word]
        while word != 0:
            if found == indices.size:
                return found + 1, last_bit
            at_bit = 64 * at_word + _lowest_bit(word)
            word &= word - np.uint64(1)
            gap = (at_bit - last_bit - 1) << bits
            last_bit = at_bit
            for plane in range(whole):
                gap |= np.int64(planes[plane, found]) << (8 * plane)
            if width:
                if filled < width:
                    held |= np.int64(fields[at_byte]) << filled
                    at_byte += 1
                    filled += 8
                gap |= (held & ((1 << width) - 1)) << (8 * whole)
                held >>= width
                filled -= width
            index += gap + 1
            indices[found] = index
            found += 1
    return found, last_bit

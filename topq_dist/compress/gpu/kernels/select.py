"""Exact top-k of all segments of a vector, in a number of launches that no segment adds to.

find_candidates: one pass over the vector, which lists what reaches last step's threshold.
count_digits: a pass over the candidates for each digit of the k-th largest key, by radix.
count_selected, place_blocks, write_selected: the k of each segment, in the order of the indices.

A block is BLOCK elements of one segment, and one program's. Candidates of a block lie together, in
the order of their indices; where in the room of its segment, the order of the programs decides, and
the table of blocks says. Where a threshold has missed (fewer than k reach it, or more than there is
room for), the same kernels look at the segment itself instead of its candidates.

    segments    int64 (segments, 6): start, numel, k, where its selected begin, where its candidates
                begin, room for how many
    blocks      int64 (blocks, 2): segment, start
    lows        int64 (segments,): the key that candidates reach
    reached     int64 (segments,), zero at first: how many do
    listed      int64 (blocks, 2): where in the room the candidates of a block begin, how many
    highest     int64 (1,), zero at first: the largest key of the vector
    histograms  int32 (digits, segments, 256), zero at first
    narrowed    int64 (digits, segments, 2): the digits of the k-th key so far, and how many of the
                keys that begin with them are selected
    places      int64 (blocks, 2): of a block, how many keys are above the k-th, and how many equal
"""

import triton
import triton.language as tl

from topq_dist.compress.gpu.kernels.vectors import key_of, key_of_number, number_of, sum_bits

# a digit has eight bits, the last one what is left of a key
DIGIT_BITS = tl.constexpr(8)
DIGITS = tl.constexpr(256)


@triton.jit
def find_candidates(
    gradient,
    residual,
    segments,
    blocks,
    lows,
    reached,
    listed,
    highest,
    found_at,
    found_bits,
    KIND: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    KEY_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """List in found_at (int32, within the block) and found_bits what reaches the threshold."""
    block = tl.program_id(0)
    segment = tl.load(blocks + 2 * block)
    start = tl.load(blocks + 2 * block + 1)
    entry = segments + 6 * segment
    stop = tl.load(entry) + tl.load(entry + 1)
    room_start = tl.load(entry + 4)
    room = tl.load(entry + 5)
    low = tl.load(lows + segment)
    within = tl.arange(0, BLOCK)
    mask = start + within < stop
    bits = sum_bits(gradient, residual, start + within, mask, KIND, HAS_RESIDUAL)
    keys = key_of(bits, KEY_BITS)
    reaches = mask & (keys >= tl.minimum(low, 0x7FFFFFFFFFFFFFFF >> (63 - KEY_BITS)).to(keys.dtype))
    counted = tl.cumsum(reaches.to(tl.int32), 0)
    count = tl.max(counted, 0)
    tl.atomic_max(highest, tl.max(tl.where(mask, keys, 0), 0).to(tl.int64))
    begin = tl.atomic_add(reached + segment, count.to(tl.int64))
    first = room_start + begin - 1
    # all of a block's or none, and the scalar in a comparison: the interpreter broadcasts no flags
    fits = reaches & (counted <= tl.where(begin + count <= room, BLOCK, 0))
    tl.store(found_at + first + counted, within, mask=fits)
    tl.store(found_bits + first + counted, bits, mask=fits)
    tl.store(listed + 2 * block, begin)
    tl.store(listed + 2 * block + 1, count.to(tl.int64))


@triton.jit
def block_of(segments, blocks, reached, listed, block, BLOCK: tl.constexpr):
    """What to look at for a block: its segment, k, where its candidates begin, how many of them,
    and of its elements, one of both being 0.
    """
    segment = tl.load(blocks + 2 * block)
    start = tl.load(blocks + 2 * block + 1)
    entry = segments + 6 * segment
    stop = tl.load(entry) + tl.load(entry + 1)
    k = tl.load(entry + 2)
    count = tl.load(reached + segment)
    hit = (count >= k) & (count <= tl.load(entry + 5))
    begin = tl.load(entry + 4) + tl.load(listed + 2 * block)
    some = tl.where((k > 0) & hit, tl.load(listed + 2 * block + 1), 0)
    whole = tl.where((k > 0) & (hit == 0), tl.minimum(stop - start, BLOCK), 0)
    return segment, start, k, begin, some, whole


@triton.jit
def look_at(
    gradient,
    residual,
    found_at,
    found_bits,
    start,
    begin,
    some,
    whole,
    at,
    KIND: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """The indices, bit patterns and mask of some of a block's candidates, or of its elements."""
    is_listed = at < some
    is_plain = at < whole
    within = tl.load(found_at + begin + at, mask=is_listed, other=0).to(tl.int64)
    listed = tl.load(found_bits + begin + at, mask=is_listed, other=0)
    plain = sum_bits(gradient, residual, start + at, is_plain, KIND, HAS_RESIDUAL)
    index = start + tl.where(is_listed, within, at)
    return index, tl.where(is_listed, listed, plain), is_listed | is_plain


@triton.jit
def narrow(histograms, narrowed, segments_count, segment, k, digit, BITS: tl.constexpr):
    """Take in the histogram of a digit: the k-th key up to it, and how many of those are selected.

    BITS: of the digit.
    """
    before = tl.where(digit > 0, digit - 1, 0)
    known = narrowed + 2 * (before * segments_count + segment)
    prefix = tl.load(known, mask=digit > 0, other=0)
    left = tl.load(known + 1, mask=digit > 0, other=0)
    left = tl.where(digit > 0, left, k)
    lanes = tl.arange(0, DIGITS)
    counts = tl.load(histograms + (digit * segments_count + segment) * DIGITS + lanes)
    counts = counts.to(tl.int64)
    from_top = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
    chosen = tl.max(tl.where(from_top >= left, lanes, 0), 0)
    above = tl.sum(tl.where(lanes > chosen, counts, 0), 0)
    return (prefix << BITS) | chosen.to(tl.int64), left - above


@triton.jit
def count_digits(
    gradient,
    residual,
    segments,
    blocks,
    reached,
    listed,
    found_at,
    found_bits,
    histograms,
    narrowed,
    segments_count,
    digit,
    KIND: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    KEY_BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Count the digit at SHIFT, of BITS bits, of the keys that begin as the k-th does."""
    block = tl.program_id(0)
    segment, start, k, begin, some, whole = block_of(
        segments, blocks, reached, listed, block, BLOCK
    )
    prefix = tl.zeros([], tl.int64)
    if not FIRST:
        prefix, left = narrow(
            histograms, narrowed, segments_count, segment, k, digit - 1, DIGIT_BITS
        )
        # the same from each block of the segment
        known = narrowed + 2 * ((digit - 1) * segments_count + segment)
        tl.store(known, prefix, mask=k > 0)
        tl.store(known + 1, left, mask=k > 0)
    lanes = tl.arange(0, DIGITS)
    counts = tl.zeros([DIGITS], tl.int32)
    for offset in range(0, some + whole, CHUNK):
        at = offset + tl.arange(0, CHUNK)
        _, bits, mask = look_at(
            gradient, residual, found_at, found_bits, start, begin, some, whole, at, KIND,
            HAS_RESIDUAL,
        )  # fmt: skip
        keys = key_of(bits, KEY_BITS).to(tl.int64)
        if not FIRST:
            mask = mask & ((keys >> (SHIFT + BITS)) == prefix)
        digits = ((keys >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)
        counts += tl.histogram(digits, DIGITS, mask=mask)
    to = histograms + (digit * segments_count + segment) * DIGITS + lanes
    tl.atomic_add(to, counts, mask=counts > 0)


@triton.jit
def count_selected(
    gradient,
    residual,
    segments,
    blocks,
    reached,
    listed,
    found_at,
    found_bits,
    histograms,
    narrowed,
    segments_count,
    places,
    KIND: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    KEY_BITS: tl.constexpr,
    LAST_DIGIT: tl.constexpr,
    LAST_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Count the keys of each block that are above the k-th of its segment, and equal to it."""
    block = tl.program_id(0)
    segment, start, k, begin, some, whole = block_of(
        segments, blocks, reached, listed, block, BLOCK
    )
    kth, ties = narrow(histograms, narrowed, segments_count, segment, k, LAST_DIGIT, LAST_BITS)
    known = narrowed + 2 * (LAST_DIGIT * segments_count + segment)
    tl.store(known, kth, mask=k > 0)
    tl.store(known + 1, ties, mask=k > 0)
    above = tl.zeros([CHUNK], tl.int32)
    equal = tl.zeros([CHUNK], tl.int32)
    for offset in range(0, some + whole, CHUNK):
        at = offset + tl.arange(0, CHUNK)
        _, bits, mask = look_at(
            gradient, residual, found_at, found_bits, start, begin, some, whole, at, KIND,
            HAS_RESIDUAL,
        )  # fmt: skip
        keys = key_of(bits, KEY_BITS).to(tl.int64)
        above += (mask & (keys > kth)).to(tl.int32)
        equal += (mask & (keys == kth)).to(tl.int32)
    tl.store(places + 2 * block, tl.sum(above, 0).to(tl.int64))
    tl.store(places + 2 * block + 1, tl.sum(equal, 0).to(tl.int64))


@triton.jit
def place_blocks(
    segments,
    first_blocks,
    narrowed,
    segments_count,
    places,
    highest,
    lows,
    thresholds,
    slacks,
    KIND: tl.constexpr,
    KEY_BITS: tl.constexpr,
    INFINITE: tl.constexpr,
    LAST_DIGIT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Make of each block's counts those of the blocks before it, and of the k-th key a threshold.

    first_blocks: int64 (segments + 1,). thresholds, slacks: fp32 (segments,), the last threshold as
    a number, and how far below it to begin. The latter follow the rules of sparsify/topk.py; after
    a step that is not finite they stay what they are.
    """
    segment = tl.program_id(0)
    first = tl.load(first_blocks + segment)
    stop = tl.load(first_blocks + segment + 1)
    k = tl.load(segments + 6 * segment + 2)
    above = tl.zeros([], tl.int64)
    equal = tl.zeros([], tl.int64)
    for offset in range(first, stop, CHUNK):
        at = offset + tl.arange(0, CHUNK)
        mask = at < stop
        here = tl.load(places + 2 * at, mask=mask, other=0)
        tied = tl.load(places + 2 * at + 1, mask=mask, other=0)
        tl.store(places + 2 * at, above + tl.cumsum(here, 0) - here, mask=mask)
        tl.store(places + 2 * at + 1, equal + tl.cumsum(tied, 0) - tied, mask=mask)
        above += tl.sum(here, 0)
        equal += tl.sum(tied, 0)
    kth = tl.load(narrowed + 2 * (LAST_DIGIT * segments_count + segment), mask=k > 0, other=0)
    counts = (k > 0) & (tl.load(highest) < INFINITE)
    number = number_of(kth, KEY_BITS, KIND)
    before = tl.load(thresholds + segment)
    slack = tl.load(slacks + segment)
    drop = tl.where(before > 0, 1.0 - number / tl.where(before > 0, before, 1.0), 0.0)
    grown = tl.minimum(tl.maximum(tl.maximum(0.95 * slack, 2.0 * drop), 0.002), 0.5)
    slack = tl.where(before > 0, grown, slack)
    low = key_of_number(number * (1.0 - slack), KEY_BITS, KIND)
    tl.store(thresholds + segment, number, mask=counts)
    tl.store(slacks + segment, slack, mask=counts)
    # not below the smallest number there is, or zeros would be candidates
    tl.store(lows + segment, tl.maximum(low, 1), mask=counts)


@triton.jit
def write_selected(
    gradient,
    residual,
    segments,
    blocks,
    reached,
    listed,
    found_at,
    found_bits,
    narrowed,
    segments_count,
    places,
    indices,
    numbers,
    KIND: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    KEY_BITS: tl.constexpr,
    LAST_DIGIT: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write the indices, ascending, and the bit patterns of the k largest of each segment."""
    block = tl.program_id(0)
    segment, start, k, begin, some, whole = block_of(
        segments, blocks, reached, listed, block, BLOCK
    )
    known = narrowed + 2 * (LAST_DIGIT * segments_count + segment)
    kth = tl.load(known, mask=k > 0, other=0)
    ties = tl.load(known + 1, mask=k > 0, other=0)
    above = tl.load(places + 2 * block)
    equal = tl.load(places + 2 * block + 1)
    to = tl.load(segments + 6 * segment + 3) + above + tl.minimum(equal, ties)
    for offset in range(0, some + whole, CHUNK):
        at = offset + tl.arange(0, CHUNK)
        index, bits, mask = look_at(
            gradient, residual, found_at, found_bits, start, begin, some, whole, at, KIND,
            HAS_RESIDUAL,
        )  # fmt: skip
        keys = key_of(bits, KEY_BITS).to(tl.int64)
        tied = mask & (keys == kth)
        counted = equal + tl.cumsum(tied.to(tl.int32), 0)
        chosen = (mask & (keys > kth)) | (tied & (counted <= ties))
        place = to + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(indices + place, index, mask=chosen)
        tl.store(numbers + place, bits, mask=chosen)
        to += tl.sum(chosen.to(tl.int32), 0)
        equal += tl.sum(tied.to(tl.int32), 0)

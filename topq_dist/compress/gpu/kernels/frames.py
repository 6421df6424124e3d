"""Frames in slots, written and read: the bytes of exchange/slots.py and codec/header.py.

plan    int64 (4,): how many values the frame holds, its unary bits, its bytes, and 1 where it is
        not finite, 2 where it has no room in its slot
row     int32: a slot, its head and then the frame, zero at first
heads   int64 (frames, 8): how many values, unary bits, 1 where damaged, bytes, checksum,
        exponent, and of read_heads' bits
report  int64 (ranks,), zero when a step begins: its bits, of all frames of the step
"""

import triton
import triton.language as tl

from topq_dist.compress.gpu.kernels.indices import DAMAGED, low_byte
from topq_dist.compress.gpu.kernels.values import (
    V_BF16,
    V_FP16,
    V_FP32,
    V_FP64,
    V_INT4,
    V_INT8,
    VALUES,
    fp16_exponent,
    power_of_two,
)

HEAD = tl.constexpr(8)
# words of a slot before its frame
SLOT_WORDS = tl.constexpr(8)
MAGIC = tl.constexpr(0x51504F54)
# index codings, and flags of a header
ALL = tl.constexpr(0)
RAW = tl.constexpr(1)
TILED = tl.constexpr(4)
SEGMENTED = tl.constexpr(2)
# of a report
NOT_FINITE = tl.constexpr(1)
FAILED = tl.constexpr(2)
DIFFERS = tl.constexpr(4)
# of fp16 values, see codec/values.py
LEAST_EXPONENT = tl.constexpr(-126)
MOST_EXPONENT = tl.constexpr(113)
# bytes of the list of segments that a program compares: there are no more than five for each block
LISTED = tl.constexpr(32)


@triton.jit
def plan_frame(
    tile_bits,
    tiles,
    highest,
    peak,
    plan,
    row,
    settings_digest,
    coherence,
    numel,
    k,
    directory_bytes,
    low_bytes,
    listed_bytes,
    value_bytes,
    blocks,
    room_bytes,
    INFINITE: tl.constexpr,
    KIND: tl.constexpr,
    FORMAT: tl.constexpr,
    RICE: tl.constexpr,
    HEADER: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Place the tiles' codes, decide what the frame holds, and write the slot's head and header.

    coherence: int32 (4,), the patterns of two fp64 numbers.
    """
    unary_bits = tl.full([], 0, tl.int64)
    for offset in range(0, tiles, CHUNK):
        at = offset + tl.arange(0, CHUNK)
        bits = tl.load(tile_bits + at, mask=at < tiles, other=0)
        tl.store(tile_bits + at, unary_bits + tl.cumsum(bits, 0) - bits, mask=at < tiles)
        unary_bits += tl.sum(bits, 0)
    index_bytes = directory_bytes + low_bytes + ((unary_bits + 7) >> 3)
    frame_bytes = HEADER + index_bytes + listed_bytes + value_bytes
    finite = tl.load(highest) < INFINITE
    fits = frame_bytes <= room_bytes
    held = tl.where(finite & fits, k, 0).to(tl.int64)
    some = held > 0
    frame_bytes = tl.where(some, frame_bytes, 32)
    tl.store(plan, held)
    tl.store(plan + 1, unary_bits)
    tl.store(plan + 2, frame_bytes)
    tl.store(plan + 3, tl.where(finite, tl.where(fits, 0, 2), 1).to(tl.int64))
    tl.store(row, frame_bytes.to(tl.int32))
    tl.store(row + 1, 0)
    tl.store(row + 2, settings_digest)
    tl.store(row + 3, 0)
    for word in tl.static_range(4):
        tl.store(row + 4 + word, tl.load(coherence + word))
    header = row + SLOT_WORDS
    full: tl.constexpr = TILED if RICE >= 0 else ALL
    coding = tl.where(some, full, tl.where(numel == 0, ALL, RAW))
    segmented = some & (listed_bytes > 0)
    flags = tl.where(finite, tl.where(segmented, SEGMENTED, 0), 1)
    exponent = 0
    if FORMAT == V_FP16:
        exponent = tl.where(some, fp16_exponent(tl.load(peak), KIND), 0)
    rice = tl.where(some, RICE if RICE > 0 else 0, 0)
    tl.store(header, MAGIC)
    tl.store(header + 1, 1 | (flags << 8) | (FORMAT << 16) | (coding << 24))
    tl.store(header + 2, rice | ((exponent & 255) << 8))
    tl.store(header + 3, tl.where(some, index_bytes, 0).to(tl.int32))
    # an argument of one is compiled in, and has no dtype
    length = tl.full([], 0, tl.int64) + numel
    tl.store(header + 4, length.to(tl.int32))
    tl.store(header + 5, (length >> 32).to(tl.int32))
    tl.store(header + 6, held.to(tl.int32))
    tl.store(header + 7, 0)
    if HEADER == 40:
        tl.store(header + 8, listed_bytes, mask=some)
        tl.store(header + 9, blocks, mask=some)


@triton.jit
def write_payload(
    indices,
    k,
    listed,
    codes,
    scales,
    plan,
    frame,
    unary_at,
    low_bytes,
    listed_bytes,
    value_bytes,
    blocks,
    RICE: tl.constexpr,
    FORMAT: tl.constexpr,
    LANES: tl.constexpr,
):
    """Write what follows the unary stream: low bits, the list of segments, values.

    frame: uint8. unary_at: where in it the unary stream begins.
    """
    byte = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask = (byte < low_bytes + listed_bytes + value_bytes) & (byte < tl.load(plan) * 2**32)
    to = frame + unary_at + ((tl.load(plan + 1) + 7) >> 3)
    is_low = mask & (byte < low_bytes)
    value = tl.zeros([LANES], tl.int64)
    if RICE > 0:
        value = tl.where(is_low, low_byte(indices, k, byte, is_low, RICE), 0)
    at = byte - low_bytes
    is_listed = mask & (at >= 0) & (at < listed_bytes)
    value = value | tl.load(listed + at, mask=is_listed, other=0).to(tl.int64)
    at = at - listed_bytes
    mine = mask & (at >= 0)
    if FORMAT == V_FP32 or FORMAT == V_FP64 or FORMAT == V_FP16 or FORMAT == V_BF16:
        ITEM: tl.constexpr = 4 if FORMAT == V_FP32 else (8 if FORMAT == V_FP64 else 2)
        number = tl.load(codes + at // ITEM, mask=mine, other=0).to(tl.int64)
        value = value | ((number >> (8 * (at % ITEM))) & 255)
    else:
        BITS: tl.constexpr = 8 if FORMAT == V_INT8 else (4 if FORMAT == V_INT4 else 2)
        EACH: tl.constexpr = 8 // BITS
        is_scale = mine & (at < 4 * blocks)
        scale = tl.load(scales + at // 4, mask=is_scale, other=0).to(tl.int64)
        value = value | ((scale >> (8 * (at % 4))) & tl.where(is_scale, 255, 0))
        place = (at - 4 * blocks) * EACH
        for code in tl.static_range(EACH):
            known = mine & (place >= 0) & (place + code < k)
            one = tl.load(codes + place + code, mask=known, other=0).to(tl.int64)
            value = value | (one << (code * BITS))
    tl.store(to + byte, value.to(tl.uint8), mask=mask)


@triton.jit
def word_at(row, word):
    """A word of a slot, without sign."""
    return tl.load(row + word).to(tl.int64) & 0xFFFFFFFF


@triton.jit
def read_heads(
    rows,
    stride_words,
    heads,
    report,
    numel,
    k,
    directory_bytes,
    low_bytes,
    most_unary_bytes,
    listed_bytes,
    value_bytes,
    blocks,
    room_bytes,
    FORMAT: tl.constexpr,
    RICE: tl.constexpr,
    HEADER: tl.constexpr,
):
    """Read each slot's head and header: what the frame holds, and what is wrong with it.

    Every rank's frame is of the same elements, or of none. A header that codec/header.py refuses is
    damaged, and so is one of another shape.
    """
    frame = tl.program_id(0).to(tl.int64)
    row = rows + frame * stride_words
    header = row + SLOT_WORDS
    length = word_at(row, 0) | (word_at(row, 1) << 32)
    failed = (word_at(row, 3) & 0xFFFF) != 0
    kind = word_at(header, 1)
    flags = (kind >> 8) & 255
    form = (kind >> 16) & 255
    coding = (kind >> 24) & 255
    exponent = ((word_at(header, 2) >> 8) & 255).to(tl.int8, bitcast=False).to(tl.int64)
    index_bytes = word_at(header, 3)
    held = word_at(header, 6)
    some = held > 0
    unary_bytes = index_bytes - directory_bytes - low_bytes
    full: tl.constexpr = TILED if RICE >= 0 else ALL
    rice: tl.constexpr = RICE if RICE > 0 else 0
    good = (word_at(header, 0) == MAGIC) & ((kind & 255) == 1) & (form == FORMAT)
    good = good & ((word_at(header, 4) | (word_at(header, 5) << 32)) == numel)
    good = good & ((word_at(header, 2) >> 16) == 0)
    whole = (held == k) & (coding == full) & ((word_at(header, 2) & 255) == rice)
    whole = whole & (unary_bytes >= 0) & (unary_bytes <= most_unary_bytes)
    whole = whole & (length == HEADER + index_bytes + listed_bytes + value_bytes)
    if HEADER == 40:
        whole = whole & (flags == SEGMENTED) & (word_at(header, 8) == listed_bytes)
        whole = whole & (word_at(header, 9) == blocks)
    else:
        whole = whole & (flags == 0)
    # nothing of nothing is everything
    none = tl.where(tl.full([], 0, tl.int64) + numel == 0, ALL, RAW)
    empty = (index_bytes == 0) & (length == 32) & (flags <= 1)
    empty = empty & (coding == none) & ((word_at(header, 2) & 255) == 0)
    if FORMAT == V_FP16:
        good = good & (exponent >= LEAST_EXPONENT) & (exponent <= MOST_EXPONENT)
    else:
        good = good & (exponent == 0)
    good = good & tl.where(some, whole, empty) & (length <= room_bytes)
    good = good | failed
    differs = word_at(row, 2) != word_at(rows, 2)
    bits = tl.where((flags == 1) & good, NOT_FINITE, 0) | tl.where(failed, FAILED, 0)
    bits = bits | tl.where(differs, DIFFERS, 0)
    bits = tl.where(failed, FAILED, bits).to(tl.int64)
    readable = good & (failed == 0)
    head = heads + frame * HEAD
    tl.store(head, tl.where(readable & some, held, 0))
    tl.store(head + 1, tl.where(readable & some, unary_bytes * 8, 0))
    tl.store(head + 2, tl.where(good, 0, 1).to(tl.int64))
    tl.store(head + 3, tl.where(readable, length, 32))
    tl.store(head + 4, tl.where(failed, -1, word_at(header, 7)))
    tl.store(head + 5, exponent)
    tl.store(head + 6, bits)
    tl.atomic_or(report + frame, bits)


@triton.jit
def check_frames(heads, sums, sums_stride, report):
    """Report a frame whose checksum is another, or which is damaged in another way."""
    frame = tl.program_id(0)
    head = heads + frame * HEAD
    wanted = tl.load(head + 4)
    found = tl.load(sums + frame * sums_stride).to(tl.int64) & 0xFFFFFFFF
    damaged = (tl.load(head + 2) != 0) | ((wanted != found) & (wanted >= 0))
    tl.atomic_or(report + frame, DAMAGED, mask=damaged)


@triton.jit
def read_values(
    frames,
    stride,
    heads,
    report,
    value_blocks,
    count,
    k,
    directory_bytes,
    low_bytes,
    listed,
    listed_bytes,
    values,
    FORMAT: tl.constexpr,
    HEADER: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write the values of each frame, fp32 or fp64 (frames, k).

    Reported as damaged: a value that is not finite, bits behind the last one, and another list of
    segments.
    """
    frame = tl.program_id(1).to(tl.int64)
    head = heads + frame * HEAD
    held = tl.load(head)
    if held > 0:
        block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
        known = block < count
        start = tl.load(value_blocks + 3 * block, mask=known, other=0)
        size = tl.load(value_blocks + 3 * block + 1, mask=known, other=0)
        lane = tl.arange(0, VALUES)
        mask = lane[None, :] < size[:, None]
        at = start[:, None] + lane[None, :]
        unary_bytes = (tl.load(head + 1) + 7) >> 3
        payload = frames + frame * stride + HEADER + directory_bytes + unary_bytes
        payload += low_bytes
        wrong = tl.full([], 0, tl.int32)
        if HEADER == 40:
            byte = tl.program_id(0) * LISTED + tl.arange(0, LISTED)
            there = byte < listed_bytes
            wanted = tl.load(listed + byte, mask=there, other=0)
            found = tl.load(payload + byte, mask=there, other=0)
            wrong = tl.max((wanted != found).to(tl.int32), 0)
        payload += listed_bytes
        if FORMAT == V_FP32 or FORMAT == V_FP64 or FORMAT == V_FP16 or FORMAT == V_BF16:
            ITEM: tl.constexpr = 4 if FORMAT == V_FP32 else (8 if FORMAT == V_FP64 else 2)
            bits = tl.zeros([BLOCKS, VALUES], tl.int64)
            for byte in tl.static_range(ITEM):
                one = tl.load(payload + at * ITEM + byte, mask=mask, other=0).to(tl.int64)
                bits = bits | (one << (8 * byte))
            if FORMAT == V_FP64:
                number = bits.to(tl.float64, bitcast=True)
            elif FORMAT == V_FP32:
                number = bits.to(tl.int32).to(tl.float32, bitcast=True)
            elif FORMAT == V_BF16:
                number = (bits << 16).to(tl.int32).to(tl.float32, bitcast=True)
            else:
                half = bits.to(tl.int16).to(tl.float16, bitcast=True)
                number = half.to(tl.float32) * power_of_two(tl.load(head + 5).to(tl.int32))
        else:
            BITS: tl.constexpr = 8 if FORMAT == V_INT8 else (4 if FORMAT == V_INT4 else 2)
            TOP: tl.constexpr = (1 << (BITS - 1)) - 1
            base = scale_at(payload, block * 4, known)
            step = scale_at(payload, block * 4 + 2, known)
            packed = tl.load(payload + 4 * count + at * BITS // 8, mask=mask, other=0)
            code = packed.to(tl.int32) >> ((at * BITS) & 7).to(tl.int32)
            number = (code & TOP).to(tl.float32) * step[:, None] + base[:, None]
            sign = (code << (32 - BITS)) & -0x80000000
            number = (number.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
            if BITS < 8:
                used = (held * BITS) & 7
                end = tl.load(payload + 4 * count + (held * BITS >> 3), mask=used > 0, other=0)
                wrong = wrong | (end.to(tl.int32) >> used.to(tl.int32))
        beyond = mask & ((tl.abs(number) < float("inf")) == 0)
        wrong = wrong | tl.max(tl.max(beyond.to(tl.int32), 1), 0)
        tl.atomic_or(report + frame, DAMAGED, mask=wrong != 0)
        tl.store(values + frame * k + at, number, mask=mask)


@triton.jit
def scale_at(payload, at, mask):
    """A bf16 number, from two bytes."""
    low = tl.load(payload + at, mask=mask, other=0).to(tl.int32)
    high = tl.load(payload + at + 1, mask=mask, other=0).to(tl.int32)
    return ((low << 16) | (high << 24)).to(tl.float32, bitcast=True)

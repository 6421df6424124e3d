"""Tiles of Rice-coded gaps, written and read: the bits of codec/tiled.py.

indices    int64 (k,), ascending
tile_bits  int64 (tiles + 1,): bits of each tile's unary codes, then where they begin, then all
"""

import triton
import triton.language as tl

# indices of a tile
TILE = tl.constexpr(256)
# of a report
DAMAGED = tl.constexpr(8)


@triton.jit
def gaps_of(indices, k, tile):
    """The gaps of a tile's indices, and which of them there are."""
    at = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = at < k
    index = tl.load(indices + at, mask=mask, other=0)
    before = tl.load(indices + at - 1, mask=mask & (at > 0), other=-1)
    return at, index - before - 1, mask


@triton.jit
def count_tile_bits(indices, k, tile_bits, RICE: tl.constexpr):
    """Count the unary bits of each tile."""
    tile = tl.program_id(0)
    _, gap, mask = gaps_of(indices, k, tile)
    tl.store(tile_bits + tile, tl.sum(tl.where(mask, (gap >> RICE) + 1, 0), 0))


@triton.jit
def write_tiles(
    indices, k, tile_bits, plan, frame, RICE: tl.constexpr, WIDE: tl.constexpr,
    HEADER: tl.constexpr,
):  # fmt: skip
    """Write a tile's entry of the directory, and set its bits in the unary stream.

    frame: int32, zero where the unary stream will be. Nothing is written where the plan says that
    the frame holds nothing. WIDE: 1, or 2 where entries have eight bytes.
    """
    tile = tl.program_id(0)
    tiles = tl.num_programs(0)
    held = tl.load(plan)
    at, gap, mask = gaps_of(indices, k, tile)
    mask = at < held
    begin = tl.load(tile_bits + tile)
    place = begin + tl.cumsum(tl.where(mask, (gap >> RICE) + 1, 0), 0) - 1
    words = frame + HEADER // 4 + tiles * 2 * WIDE
    bit = (tl.full([TILE], 1, tl.int32) << (place & 31).to(tl.int32)).to(tl.int32)
    tl.atomic_or(words + (place >> 5), bit, mask=mask)
    first = tile.to(tl.int64) * TILE
    base = tl.load(indices + first - 1, mask=first > 0, other=-1) + 1
    entry = frame + HEADER // 4 + tile * 2 * WIDE
    write = first < held
    tl.store(entry, begin.to(tl.int32), mask=write)
    tl.store(entry + WIDE, base.to(tl.int32), mask=write)
    if WIDE == 2:
        tl.store(entry + 1, (begin >> 32).to(tl.int32), mask=write)
        tl.store(entry + 3, (base >> 32).to(tl.int32), mask=write)


@triton.jit
def low_byte(indices, k, at, mask, RICE: tl.constexpr):
    """A byte of the low bits of all gaps: whole ones in planes, then fields of what is left."""
    WHOLE: tl.constexpr = RICE // 8
    REST: tl.constexpr = RICE % 8
    plane = at // k
    one = at - plane * k
    in_plane = mask & (plane < WHOLE)
    index = tl.load(indices + one, mask=in_plane, other=0)
    before = tl.load(indices + one - 1, mask=in_plane & (one > 0), other=-1)
    byte = ((index - before - 1) >> (8 * tl.minimum(plane, 7))) & 255
    byte = tl.where(in_plane, byte, 0)
    if REST > 0:
        in_field = mask & (plane >= WHOLE)
        for bit in range(8):
            place = (at - WHOLE * k) * 8 + bit
            which = place // REST
            known = in_field & (which < k)
            index = tl.load(indices + which, mask=known, other=0)
            before = tl.load(indices + which - 1, mask=known & (which > 0), other=-1)
            low = (index - before - 1) >> (8 * WHOLE + place - which * REST)
            byte = byte | tl.where(known, (low & 1) << bit, 0)
    return byte


@triton.jit
def find_ones(
    frames, stride, heads, report, numel, found, k, tiles, RICE: tl.constexpr, WIDE: tl.constexpr,
    HEADER: tl.constexpr, HEAD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write where in its tile's codes the one of each index is, to `found`, int32 (frames, k).

    A frame is reported as damaged that has a tile of more or fewer ones than indices, or one that
    does not end with a one, the last tile aside, in whose last byte a one must be.
    """
    tile = tl.program_id(0)
    frame = tl.program_id(1).to(tl.int64)
    head = heads + frame * HEAD
    held = tl.load(head)
    unary_bits = tl.load(head + 1)
    first = tile.to(tl.int64) * TILE
    if first < held:
        row = frames + frame * stride
        begin = entry_at(row + HEADER, tile * 2, WIDE)
        stop = unary_bits
        ends_from = unary_bits - 8
        if tile + 1 < tiles:
            stop = entry_at(row + HEADER, tile * 2 + 2, WIDE)
            ends_from = stop - 1
        wrong = (tile == 0) & (begin != 0)
        begin = tl.maximum(tl.minimum(begin, unary_bits), 0)
        stop = tl.maximum(tl.minimum(stop, unary_bits), 0)
        unary = row + HEADER + tiles * 8 * WIDE
        expected = tl.minimum(held - first, TILE)
        count = tl.full([], 0, tl.int64)
        end = tl.full([], -1, tl.int64)
        for offset in range(begin, stop, CHUNK):
            at = offset + tl.arange(0, CHUNK)
            byte = tl.load(unary + (at >> 3), mask=at < stop, other=0).to(tl.int32)
            bit = (byte >> (at & 7).to(tl.int32)) & 1
            number = count + tl.cumsum(bit, 0)
            known = (bit == 1) & (number <= expected)
            tl.store(found + frame * k + first + number - 1, (at - begin).to(tl.int32), mask=known)
            count += tl.sum(bit, 0)
            end = tl.maximum(end, tl.max(tl.where(bit == 1, at, -1), 0).to(tl.int64))
        wrong = wrong | (count != expected) | (end < ends_from)
        tl.atomic_or(report + frame, DAMAGED, mask=wrong)


@triton.jit
def entry_at(directory, number, WIDE: tl.constexpr):
    """A number of the directory, from bytes."""
    at = directory + number * 4 * WIDE
    value = tl.load(at).to(tl.int64)
    for byte in tl.static_range(1, 4 * WIDE):
        value = value | (tl.load(at + byte).to(tl.int64) << (8 * byte))
    return value


@triton.jit
def read_indices(
    frames, stride, heads, report, numel, found, k, tiles, indices, RICE: tl.constexpr,
    WIDE: tl.constexpr, HEADER: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Write the indices of each frame, int64 (frames, k).

    Reported as damaged: one past the vector, bits behind the last low bits, and an entry of the
    directory that is not the index after those before it.
    """
    tile = tl.program_id(0)
    frame = tl.program_id(1).to(tl.int64)
    head = heads + frame * HEAD
    held = tl.load(head)
    first = tile.to(tl.int64) * TILE
    if first < held:
        row = frames + frame * stride
        lane = tl.arange(0, TILE)
        at = first + lane
        mask = at < held
        place = tl.load(found + frame * k + at, mask=mask, other=0)
        before = tl.load(found + frame * k + at - 1, mask=mask & (lane > 0), other=-1)
        gap = (place - before - 1).to(tl.int64) << RICE
        low = row + HEADER + tiles * 8 * WIDE + ((tl.load(head + 1) + 7) >> 3)
        WHOLE: tl.constexpr = RICE // 8
        REST: tl.constexpr = RICE % 8
        for plane in tl.static_range(WHOLE):
            byte = tl.load(low + plane * held + at, mask=mask, other=0).to(tl.int64)
            gap = gap | (byte << (8 * plane))
        if REST > 0:
            bit = at * REST
            fields = low + WHOLE * held
            both = tl.load(fields + (bit >> 3), mask=mask, other=0).to(tl.int64)
            in_two = mask & ((bit & 7) + REST > 8)
            after = tl.load(fields + (bit >> 3) + 1, mask=in_two, other=0).to(tl.int64)
            field = ((both | (after << 8)) >> (bit & 7)) & ((1 << REST) - 1)
            gap = gap | (field << (8 * WHOLE))
        base = entry_at(row + HEADER, tile * 2 + 1, WIDE)
        index = base + tl.cumsum(tl.where(mask, gap + 1, 0), 0) - 1
        last = tl.max(tl.where(mask, index, -1), 0)
        unused = tl.full([], 0, tl.int32)
        if REST > 0:
            used = (held * REST) & 7
            end = tl.load(low + WHOLE * held + (held * REST >> 3), mask=used > 0, other=0)
            unused = end.to(tl.int32) >> used.to(tl.int32)
        following = last + 1
        if first + TILE < held:
            following = entry_at(row + HEADER, tile * 2 + 3, WIDE)
        wrong = (last >= numel) | (following != last + 1) | ((tile == 0) & (base != 0))
        wrong = wrong | (unused != 0)
        tl.atomic_or(report + frame, DAMAGED, mask=wrong)
        tl.store(indices + frame * k + at, index, mask=mask)

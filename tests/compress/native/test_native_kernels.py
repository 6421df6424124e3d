"""Compiled kernels beside numpy's and a second opinion: the same bits, whatever vectors hold."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import kernels_reference as reference
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_build import SOURCES

from topq_dist.compress.codec import lowbit
from topq_dist.compress.codec.values import LOW_BITS
from topq_dist.compress.native import binding, codec_binding, library, numpy_codec, numpy_kernels

Array = npt.NDArray[Any]
LANES = 64
SIZES = [0, 1, LANES - 1, LANES, LANES + 1, 1_000, 100_000]
SOME = st.sampled_from([0, 1, 2, 7, 8, 9, LANES - 1, LANES, LANES + 1, 200, 1_000])
NUMBERS = ["f4", "f8"]
INTEGERS = ["i2", "i4", "i8"]
CODE_BITS = sorted(LOW_BITS.values())


by_numpy = SimpleNamespace(**vars(numpy_kernels) | vars(numpy_codec))


def floats(dtype: str, size: int, seed: int, *, finite: bool = False) -> Array:
    """Return numbers with ties, zeros of both signs, denormals, and what is not finite."""
    generator = np.random.default_rng(seed)
    drawn = generator.standard_normal(size)
    drawn[::3] = np.round(drawn[::3] * 3)
    numbers = drawn.astype(dtype)
    info = np.finfo(numbers.dtype)
    rare = [0.0, -0.0, info.smallest_subnormal, -info.tiny / 3, info.max, -info.max]
    rare += [] if finite else [np.inf, -np.inf, np.nan]
    where = generator.random(size) < 0.05
    numbers[where] = generator.choice(np.array(rare, dtype), int(where.sum()))
    return numbers


def aligned(size: int, dtype: str) -> Array:
    room = np.empty(size * np.dtype(dtype).itemsize + LANES, np.uint8)
    start = -room.ctypes.data % LANES
    return room[start : start + size * np.dtype(dtype).itemsize].view(dtype)


def assert_same(ours: Array, theirs: Array) -> None:
    """Compare to the bit, but for a NaN's own."""
    assert ours.dtype == theirs.dtype
    if ours.dtype.kind == "f":
        # what a sum that is no number looks like is not said
        nan = np.isnan(ours)
        np.testing.assert_array_equal(nan, np.isnan(theirs))
        bits = f"u{ours.itemsize}"
        ours, theirs = ours.view(bits)[~nan], theirs.view(bits)[~nan]
    np.testing.assert_array_equal(ours, theirs)


def lows_of(numbers: Array, seed: int) -> list[int]:
    """Return keys to reach: of everything, of some, of one that ties, of what is not finite."""
    keys = reference.keys_of(numbers)
    drawn = [] if not keys.size else np.random.default_rng(seed).choice(keys, 2).tolist()
    infinity = np.array([np.inf], f"f{numbers.itemsize}").view(f"i{numbers.itemsize}")[0]
    return [0, 1, int(infinity), *map(int, drawn)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("dtype", "update"),
    [*((dtype, False) for dtype in INTEGERS + NUMBERS), ("f4", True), ("f8", True)],
)
def test_find_reaching(size: int, dtype: str, update: bool) -> None:
    is_float = dtype[0] == "f"
    vector = floats(f"f{dtype[1]}", size, 1)
    residual = floats(dtype, size, 2) if is_float else None
    with np.errstate(all="ignore"):
        total = vector if residual is None else vector + residual
    if not is_float:
        vector = vector.view(dtype)
    for low in lows_of(total, size):
        ways: list[Callable[..., int]] = [binding.find_reaching, by_numpy.find_reaching]
        found = []
        for find in ways:
            mine = None if residual is None else residual.copy()
            before = aligned(size, dtype) if update else None
            added = np.full(1, 5) if update else None
            indices, numbers = np.empty(size + LANES, np.int64), np.empty(size + LANES, dtype)
            key = np.dtype(f"i{dtype[1]}").type(low)
            count = find(vector, mine, key, 7, indices, numbers, 0, before, added)
            found.append((indices[:count], numbers[:count], mine, before, added))
        for ours, theirs in zip(*found, strict=True):
            if ours is not None:
                assert_same(ours, theirs)
        expected, values = reference.find_reaching(vector, residual, low, 7)
        assert_same(found[0][0], expected)
        assert_same(found[0][1], values)


@given(size=SOME, room=st.integers(0, 300), held=st.integers(0, 3), seed=st.integers(0, 99))
def test_find_reaching_where_room_is_short(size: int, room: int, held: int, seed: int) -> None:
    vector = np.random.default_rng(seed).integers(0, 3, size).astype(np.int32)
    found = []
    for find in (binding.find_reaching, by_numpy.find_reaching):
        indices = np.full(room + LANES + held + 1, -1, np.int64)
        numbers = indices.astype(np.int32)
        end = room + LANES + held
        args = (indices[:end], numbers[:end], held, None, None)
        count = find(vector, None, np.int32(1), 0, *args)
        assert count <= end
        assert indices[end] == numbers[end] == -1
        found.append(count)
    # past the room it only says so
    assert found[0] == found[1] or min(found) > room + held


@pytest.mark.skipif(sys.platform != "linux", reason="memory is protected by Linux's call")
@pytest.mark.parametrize("dtype", INTEGERS + NUMBERS)
@pytest.mark.parametrize("size", [1, LANES - 1, LANES + 1, 100])
def test_nothing_is_read_behind_a_vector(size: int, dtype: str) -> None:
    page = mmap.PAGESIZE
    # what follows the first page can be neither read nor written
    memory = mmap.mmap(-1, 2 * page)
    behind = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + page
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(behind), page, 0) == 0
    vector = np.frombuffer(memory, dtype, size, page - size * np.dtype(dtype).itemsize)
    residual = np.zeros_like(vector) if dtype[0] == "f" else None
    indices, numbers = np.empty(2 * LANES, np.int64), np.empty(2 * LANES, dtype)
    assert not binding.find_reaching(vector, residual, 1, 0, indices, numbers, 0, None, None)
    if residual is not None:
        assert not binding.find_reaching(residual, vector, 1, 0, indices, numbers, 0, None, None)
    else:
        assert not binding.find_differing(vector, np.zeros_like(vector), indices)


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("dtype", ["u2", "u4", "u8"])
def test_keep_largest(size: int, dtype: str) -> None:
    generator = np.random.default_rng(size)
    most = int(np.iinfo(dtype).max)
    for largest in (1, 5, most):
        bits = generator.integers(0, largest, size, np.uint64, endpoint=True).astype(dtype)
        bits ^= (generator.integers(0, 2, size) << (8 * bits.itemsize - 1)).astype(dtype)
        if largest == 5:
            # far from all others: what is narrowed down is narrowed down again
            bits[generator.integers(0, size, 2)] = most // 2
        for k in {1, size // 100 + 1, size // 2 + 1, size}:
            top = check_keep_largest(bits, k)
            assert_same(top, reference.keep_largest(bits, k))


@given(
    size=st.integers(1, 700), seed=st.integers(0, 999), spread=st.integers(0, 31), data=st.data()
)
def test_keep_largest_of_all_kinds_of_keys(
    size: int, seed: int, spread: int, data: st.DataObject
) -> None:
    bits = np.random.default_rng(seed).integers(0, 1 << spread, size, np.uint32, endpoint=True)
    top = check_keep_largest(bits, data.draw(st.integers(1, size)))
    assert top.size


def check_keep_largest(bits: Array, k: int) -> Array:
    """Return where the largest are, once numpy has said the same."""
    indices = np.arange(bits.size, dtype=np.int64)
    magnitude = bits.dtype.type(np.iinfo(bits.dtype).max // 2)
    found = []
    for keep in (binding.keep_largest, by_numpy.keep_largest):
        near, top_bits = np.empty_like(bits), np.empty(k + 1, bits.dtype)
        top, counts = np.empty(k + 1, np.int64), np.empty(99, np.int64)
        outcome = keep(indices, bits, magnitude, k, counts, near, top, top_bits)
        found.append((np.array(outcome), top[:k], top_bits[:k]))
    for ours, theirs in zip(*found, strict=True):
        assert_same(ours, theirs)
    top = found[0][1]
    keys = reference.keys_of(bits)
    assert found[0][0].tolist() == [int(keys[top].min()), int(keys.max())]
    return top


@pytest.mark.parametrize("dtype", INTEGERS + NUMBERS)
@pytest.mark.parametrize("sizes", [[0], [1], [5, 0, 64, 65], [3_000, 1, 2_000]])
def test_select_segments(sizes: list[int], dtype: str) -> None:
    key_dtype, size = np.dtype(f"u{dtype[1]}"), sum(sizes)
    vector = floats(f"f{dtype[1]}", size, 1, finite=True)
    residual = floats(dtype, size, 2, finite=True) if dtype[0] == "f" else None
    numbers = vector if residual is None else vector + residual * 0.5
    residual = None if residual is None else residual * 0.5
    keys = reference.keys_of(numbers)
    ends = np.cumsum(sizes)
    plan, lows = [], []
    for start, stop in zip(ends - sizes, ends, strict=True):
        k = (stop - start) // 10 + (stop > start)
        # too high a key as well, and too low a one: nothing is top then
        order = np.sort(keys[start:stop])
        for rank in (2 * k, k // 2 + 1):
            plan.append((start, stop, k, 3 * k + 5))
            lows.append(order[-min(rank, order.size)] if order.size else 0)
    if dtype[0] != "f":
        vector = vector.view(dtype)
    room = size + 1 + LANES
    found = []
    for select in (binding.select_segments, by_numpy.select_segments):
        kept_size = sum(k for _, _, k, _ in plan) + 1
        top, top_bits = np.full(kept_size, -1), np.full(kept_size, 77).astype(key_dtype)
        listed, outcomes = np.empty(room, dtype), np.zeros((len(plan), 3), np.int64)
        scratch = (
            np.empty(room, np.int64),
            listed,
            listed.view(key_dtype),
            np.empty(room, key_dtype),
            np.empty(50, np.int64),
        )
        select(
            vector,
            residual,
            100,
            np.array(plan, np.int64),
            np.array(lows).astype(f"i{dtype[1]}"),
            key_dtype.type(np.iinfo(key_dtype).max // 2),
            scratch,
            top,
            top_bits,
            outcomes,
        )
        # the place behind a segment's last is written whether it counts or not
        top[-1] = top_bits[-1] = 0
        found.append((top, top_bits, outcomes))
    counted = found[0][2]
    place = 0
    for (start, stop, k, limit), (reached, _, _) in zip(plan, counted, strict=True):
        mine = slice(place, place + k)
        place += k
        if k <= reached <= limit and k:
            assert_same(found[0][0][mine], found[1][0][mine])
            assert_same(found[0][1][mine], found[1][1][mine])
            expected = reference.keep_largest(keys[start:stop], k) + start + 100
            assert_same(found[0][0][mine], expected)
    assert_same(counted[:, 1:], found[1][2][:, 1:])
    limits = np.array(plan)[:, 3]
    assert_same(np.minimum(counted[:, 0], limits + 1), np.minimum(found[1][2][:, 0], limits + 1))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["u2", "u4", "u8", "i8"])
@pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
def test_find_differing(size: int, dtype: str, share: float) -> None:
    generator = np.random.default_rng(size)
    ours = generator.integers(0, 2**15, size).astype(dtype)
    theirs = np.where(generator.random(size) < share, ours ^ 1, ours).astype(dtype)
    expected = np.flatnonzero(ours != theirs)
    for room in {0, expected.size // 2, max(0, expected.size - 1), expected.size, size}:
        indices, other = np.empty(room, np.int64), np.empty(room, np.int64)
        count = binding.find_differing(ours, theirs, indices)
        assert count == by_numpy.find_differing(ours, theirs, other)
        assert count == (expected.size if expected.size <= room else -1)
        assert_same(indices[: max(count, 0)], other[: max(count, 0)])


def lists_of(dtype: str, numel: int, lists: int, seed: int) -> tuple[Array, Array, Array]:
    """Return sparse vectors' indices and values, one after the other, and where each ends."""
    generator = np.random.default_rng(seed)
    terms = [
        np.sort(generator.choice(numel, min(numel, int(generator.integers(0, numel + 1))), False))
        for _ in range(lists)
    ]
    edges = np.cumsum([0, *(part.size for part in terms)])
    joined = np.concatenate([np.zeros(0, np.int64), *terms])
    return joined, floats(dtype, joined.size, seed, finite=True), edges


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("replace", [False, True])
def test_update_residual_span(size: int, dtype: str, replace: bool) -> None:
    indices = np.flatnonzero(np.random.default_rng(3).random(size) < 0.02)
    rest = floats(dtype, indices.size, 4)
    terms, summands, edges = lists_of(dtype, size, 3, 5)
    found = []
    for update_residual in (binding.update_residual_span, by_numpy.update_residual_span):
        residual, gradient = floats(dtype, size, 1), floats(dtype, size, 2)
        next_term = edges[:-1].copy()
        args = (indices + 9, rest, replace, terms + 9, summands, next_term, edges[1:])
        if replace:
            assert update_residual(residual, gradient, 9, *args)
        else:
            done = (edges[1:], edges[1:])
            assert update_residual(residual, gradient, 9, *args[:5], done[0].copy(), done[1])
        found.append((residual, gradient))
    for ours, theirs in zip(*found, strict=True):
        assert_same(ours, theirs)
    before = floats(dtype, size, 1), floats(dtype, size, 2)
    assert_same(found[0][0], reference.update_residual(*before, indices, rest))
    sums = reference.add_terms(np.zeros(size, dtype), terms, summands)
    assert_same(found[0][1], sums if replace else before[1])


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("wrong", [[-1], [5, 5, 4], [10], [2**40], [-(2**63)]])
def test_what_is_out_of_order_or_range_is_not_written(dtype: str, wrong: list[int]) -> None:
    indices, rest = np.array(wrong), np.ones(len(wrong), dtype)
    none, nothing = np.zeros(0, np.int64), np.zeros(0, dtype)
    room, more = np.zeros(12, dtype), np.zeros(10, dtype)
    update_residual = binding.update_residual_span
    if wrong != [5, 5, 4]:
        args = (none, nothing, none, none)
        assert not update_residual(room[1:11], more, 0, indices, rest, False, *args)
        assert not binding.scatter_add(room[1:11], indices, rest)
    next_term, ends = np.zeros(1, np.int64), np.array([len(wrong)])
    gradient = np.zeros(12, dtype)
    terms = (True, indices, rest, next_term, ends)
    done = update_residual(room[1:11], gradient[1:11], 0, none, nothing, *terms)
    assert done == (wrong == [5, 5, 4])
    assert not room.any()
    assert not gradient[[0, 11]].any()
    window = np.zeros(4, dtype)
    listed, numbers = np.empty(99, np.int64), np.empty(99, f"i{window.itemsize}")
    count = binding.sum_terms(
        indices, rest, np.zeros(1, np.int64), ends, 10, window, numbers, 1, listed, numbers
    )
    assert (count == -1) == (wrong != [5, 5, 4])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", NUMBERS)
def test_sum_terms(size: int, dtype: str) -> None:
    terms, summands, edges = lists_of(dtype, size, 3, 5)
    bits = np.dtype(f"i{dtype[1]}")
    for window_numel in (1, 100, 16_384) if size <= 1_000 else (16_384,):
        found = []
        for add_up in (binding.sum_terms, by_numpy.sum_terms):
            window = np.empty(window_numel, dtype)
            indices = np.empty(terms.size + LANES, np.int64)
            numbers = np.empty(indices.size, dtype)
            count = add_up(
                terms,
                summands,
                edges[:-1].copy(),
                edges[1:],
                size,
                window,
                window.view(bits),
                bits.type(1),
                indices,
                numbers.view(bits),
            )
            found.append((indices[:count], numbers[:count]))
        for ours, theirs in zip(*found, strict=True):
            assert_same(ours, theirs)
        total = reference.add_terms(np.zeros(size, dtype), terms, summands)
        assert_same(found[0][0], np.flatnonzero(total))
        assert_same(found[0][1], total[total != 0])


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("stride", [1, 2])
def test_scatter_add(size: int, dtype: str, stride: int) -> None:
    indices = np.random.default_rng(1).integers(0, size, size)
    values = floats(dtype, size, 2)
    ours, theirs = (floats(dtype, stride * size, 3)[::stride] for _ in range(2))
    expected = reference.add_terms(ours, indices, values)
    assert binding.scatter_add(ours, indices, values)
    assert by_numpy.scatter_add(theirs, indices, values)
    assert_same(ours, theirs)
    assert_same(ours, expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["i4", "i8"])
def test_gaps_between(size: int, dtype: str) -> None:
    indices = np.flatnonzero(np.random.default_rng(1).random(max(1, 5 * size)) < 0.2)[:size]
    numel = int(indices[-1]) + 1 if indices.size else 0
    ours, theirs = np.empty(indices.size, dtype), np.empty(indices.size, dtype)
    assert codec_binding.gaps_between(indices, numel, ours)
    assert by_numpy.gaps_between(indices, numel, theirs)
    assert_same(ours, theirs)
    assert_same(ours, (np.diff(indices, prepend=-1) - 1).astype(dtype))
    if indices.size:
        assert not codec_binding.gaps_between(indices, numel - 1, ours)
        assert not codec_binding.gaps_between(np.array([-1]), numel, ours)
        assert not codec_binding.gaps_between(np.array([0, 0]), numel, np.empty(2, dtype))


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("dtype", ["i4", "i8"])
def test_rice_code(size: int, dtype: str) -> None:
    gaps = np.random.default_rng(size).geometric(0.01, size).astype(dtype) - 1
    for bits in (0, 1, 5, 7, 8, 9, 16, 17, 31):
        total = codec_binding.sum_of_quotients(gaps, bits)
        assert total == int(by_numpy.sum_of_quotients(gaps, bits)) == int((gaps >> bits).sum())
        found = []
        for write in (codec_binding.write_gaps, by_numpy.write_gaps):
            unary = np.zeros((total + size + 7) // 8, np.uint8)
            planes = np.empty((bits // 8, size), np.uint8)
            fields = np.zeros((size * (bits % 8) + 7) // 8, np.uint8)
            write(gaps, bits, unary, planes, fields)
            found.append((unary, planes, fields))
        for ours, theirs, expected in zip(*found, reference.write_gaps(gaps, bits), strict=True):
            assert_same(ours, theirs)
            assert_same(ours, expected)
        words = np.zeros(-(-found[0][0].size // 8) * 8, np.uint8)
        words[: found[0][0].size] = found[0][0]
        for room in (size, size - 1):
            ours, theirs = np.empty(room, np.int64), np.empty(room, np.int64)
            short = [found[0][0], *found[0][1:]]
            if room < size:
                short[1] = np.ascontiguousarray(short[1][:, :room])
            count = codec_binding.read_gaps(short[0], short[1], short[2], bits, ours)
            assert count == by_numpy.read_gaps(words.view(np.uint64), *short[1:], bits, theirs)
            assert_same(ours, theirs)
            assert_same(ours, (np.cumsum(gaps.astype(np.int64) + 1) - 1)[:room])


def test_round_to_half_and_widen_half_all_patterns() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16)
    for scale in (1.0, 2.0**-14, 2.0**-126, 2.0**113):
        ours, theirs = np.empty(halves.size, np.float32), np.empty(halves.size, np.float32)
        args = (halves, np.float32(scale))
        assert not codec_binding.widen_half(*args, ours, ours.view(np.int32))
        assert not by_numpy.widen_half(*args, theirs, theirs.view(np.int32))
        finite = np.isfinite(halves.view(np.float16))
        assert_same(ours[finite], theirs[finite])
        assert_same(ours[finite], reference.widen_half(halves, scale)[finite])
        mine = np.ascontiguousarray(halves[finite & (np.abs(ours) < np.inf)])
        assert codec_binding.widen_half(mine, np.float32(scale), ours[: mine.size], ours)
    between = np.sort(halves[halves < 0x7BFF]).view(np.float16).astype(np.float32)
    # all numbers, the middles between them, and both neighbours of these
    middles = (between[1:] + between[:-1]) / 2
    numbers = np.concatenate([between, middles, np.nextafter(middles, 9), np.nextafter(middles, 0)])
    check_round_to_half(
        np.concatenate([numbers, -numbers, floats("f4", 9_999, 1, finite=True) % 60_000]), 1.0
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1.0, 2.0**-20, 2.0**126])
def test_round_to_half(size: int, scale: float) -> None:
    numbers = floats("f4", size, size, finite=True)
    with np.errstate(over="ignore"):
        numbers[~(np.abs(numbers * np.float32(scale)) < 65_520)] = 0.0
    check_round_to_half(numbers, scale)


def check_round_to_half(numbers: Array, scale: float) -> None:
    numbers = np.nan_to_num(numbers)
    found = []
    for narrow in (codec_binding.round_to_half, by_numpy.round_to_half):
        scaled, halves = np.empty_like(numbers), np.empty(numbers.size, np.uint16)
        narrow(numbers, np.float32(scale), scaled, scaled.view(np.int32), halves)
        found.append(halves)
    assert_same(*found)
    expected = (numbers * np.float32(scale)).astype(np.float16)
    assert_same(found[0], expected.view(np.uint16))


KS = st.lists(st.sampled_from([0, 1, 2, 3, 127, 128, 129, 300]), max_size=6)


@given(ks=KS, seed=st.integers(0, 999), code_bits=st.sampled_from(CODE_BITS))
def test_blocks_of_levels(ks: list[int], seed: int, code_bits: int) -> None:
    check_blocks_of_levels(np.array(ks, np.int64), seed, code_bits)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("code_bits", CODE_BITS)
def test_blocks_of_levels_of_one_segment(size: int, code_bits: int) -> None:
    check_blocks_of_levels(np.array([size]), 1, code_bits)


def check_blocks_of_levels(ks: Array, seed: int, code_bits: int) -> None:
    values = floats("f4", int(ks.sum()), seed, finite=True)
    if seed % 3 == 0:
        # many alike
        values = np.copysign(np.float32(seed), values)
    blocks = lowbit.block_count(ks)
    payload = np.full(lowbit.lowbit_bytes(values.size, code_bits, blocks) + 1, 77, np.uint8)
    scales, packed = np.split(payload[:-1], [4 * blocks])
    decoded = np.full(values.size + 1, 77, np.float32)
    codec_binding.encode_blocks(values, ks, code_bits, scales, packed, decoded[:-1])
    assert payload[-1] == decoded[-1] == 77
    payload, decoded = payload[:-1], decoded[:-1]
    expected, (levels, again) = np.empty_like(payload), np.empty((2, values.size), np.float32)
    scales, packed = np.split(expected, [4 * blocks])
    by_numpy.encode_blocks(values, ks, code_bits, scales, packed, levels)
    by_numpy.decode_blocks(payload, ks, code_bits, again)
    assert_same(payload, expected)
    assert_same(decoded, levels)
    assert_same(decoded, again)
    assert_same(
        np.concatenate([np.zeros(0, np.uint8), *payload_by_numpy(values, ks, code_bits)]), payload
    )
    back = np.empty_like(values)
    codec_binding.decode_blocks(payload, ks, code_bits, back)
    assert_same(back, decoded)


def payload_by_numpy(values: Array, ks: Array, code_bits: int) -> tuple[Array, Array]:
    """Return scales and packed codes."""
    top, scales, codes = (1 << (code_bits - 1)) - 1, [], [np.zeros(0, np.uint8)]
    for where in reference.blocks_of(ks, 128):
        block = np.minimum(np.abs(values[where]), np.float32(2.0**127))
        base, step = reference.scales(block, code_bits)
        scales += [base, step]
        levels = reference.nearest_levels(block, base, step, top)
        codes.append(levels | np.signbit(values[where]).astype(np.uint8) << (code_bits - 1))
    halves = (np.array(scales, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    bits = np.concatenate(codes)[:, None] >> np.arange(code_bits) & 1
    return halves.view(np.uint8), np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little")


@pytest.mark.parametrize("kind", [codec_binding, by_numpy], ids=["compiled", "numpy"])
@pytest.mark.parametrize("code_bits", CODE_BITS)
def test_a_payload_that_does_not_fit_is_refused(code_bits: int, kind: Any) -> None:
    ks, values = np.array([5, 130]), floats("f4", 135, 1, finite=True)
    payload = np.concatenate(payload_by_numpy(values, ks, code_bits))
    for wrong_ks in ([135], [5, 129], [5, 131], [-1, 136], [2**62, 2**62, 135], []):
        with pytest.raises(ValueError, match="bytes"):
            kind.decode_blocks(payload, np.array(wrong_ks, np.int64), code_bits, values)
    for wrong in (payload[:-1], np.append(payload, np.uint8(0)), payload[:0]):
        with pytest.raises(ValueError, match="bytes"):
            kind.decode_blocks(wrong, ks, code_bits, values)
    if code_bits < 8:
        payload[-1] |= 128
        with pytest.raises(ValueError, match="not zero"):
            kind.decode_blocks(payload, ks, code_bits, values)
        payload[-1] &= 127
    payload[:2] = np.array([0x7F80], np.uint16).view(np.uint8)
    with pytest.raises(ValueError, match="not finite"):
        kind.decode_blocks(payload, ks, code_bits, values)


@given(
    rows=st.lists(
        st.tuples(st.sampled_from([1, 2, 9, 130, 300, 1_000]), st.booleans()), max_size=6
    ),
    dtype=st.sampled_from(NUMBERS),
    bound=st.sampled_from([1.0, 0.3, 5.0]),
    seed=st.integers(0, 999),
)
def test_bound_rows(rows: list[tuple[int, bool]], dtype: str, bound: float, seed: int) -> None:
    check_bound_rows(rows, dtype, bound, seed)


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("dtype", NUMBERS)
def test_bound_one_row(size: int, dtype: str) -> None:
    check_bound_rows([(size, False)], dtype, 1.0, 1)


def check_bound_rows(rows: list[tuple[int, bool]], dtype: str, bound: float, seed: int) -> None:
    ks = np.array([k for k, _ in rows], np.int64)
    # half of a row, or less
    numels = np.array([2 * k + (not whole) for k, whole in rows], np.int64)
    values = floats(dtype, int(ks.sum()), seed, finite=True)
    if seed % 5 == 0:
        values[: ks[0] if rows else 0] *= 0
    ours = np.empty_like(values)
    binding.bound_rows(values, ks, numels, bound, ours)
    theirs = np.empty_like(values)
    by_numpy.bound_rows(values, ks, numels, bound, theirs)
    assert_same(ours, theirs)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("parts", [1, 2, 3, 16])
def test_split_indices_and_indices_of_part(size: int, parts: int) -> None:
    indices = np.flatnonzero(np.random.default_rng(1).random(7 * size + 1) < 1 / 7)
    found = []
    for kind in (binding, by_numpy):
        edges = np.zeros(parts + 1, np.int64)
        mine, places = np.empty_like(indices), np.empty_like(indices)
        kind.split_indices(indices, 509, edges, mine, places)
        found.append((edges, mine, places))
    for ours, theirs in zip(*found, strict=True):
        assert_same(ours, theirs)
    edges, mine, places = found[0]
    owner, place = reference.owners(indices, 509, parts)
    for part in range(parts):
        here = slice(edges[part], edges[part + 1])
        assert_same(mine[here], np.flatnonzero(owner == part))
        assert_same(places[here], place[owner == part])
        ours, theirs = np.empty_like(places[here]), np.empty_like(places[here])
        binding.indices_of_part(places[here], 509, parts, part, ours)
        by_numpy.indices_of_part(places[here], 509, parts, part, theirs)
        assert_same(ours, theirs)
        assert_same(ours, indices[mine[here]])


@given(sizes=st.lists(st.sampled_from([0, 1, 2, 16, 100]), min_size=1), seed=st.integers(0, 99))
def test_gather_and_scatter_tensors(sizes: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    edges = np.cumsum([0, *sizes])
    for dtype in ("u2", "u4", "u8"):
        tensors = [generator.integers(0, 2**16, size).astype(dtype) for size in sizes]
        addresses = np.array([tensor.ctypes.data for tensor in tensors])
        flat = np.empty(edges[-1], dtype)
        binding.gather_tensors(addresses, edges * flat.itemsize, flat)
        assert_same(flat, np.concatenate(tensors))
        indices = np.flatnonzero(generator.random(flat.size) < 0.3)
        other = flat + flat.dtype.type(1)
        assert binding.scatter_to_tensors(addresses, edges, other, indices)
        flat[indices] = other[indices]
        assert_same(flat, np.concatenate(tensors))
        for wrong in ([-1], [flat.size], [2**60], [0, 0] if flat.size else [0]):
            assert not binding.scatter_to_tensors(addresses, edges, other, np.array(wrong))


def test_argument_lists_are_those_of_the_header() -> None:
    header = (SOURCES / "topq_kernels.h").read_text()
    declared = {}
    for returned, name, takes in re.findall(r"TOPQ_API\s+(\w+) topq_(\w+)\(([^)]*)\);", header):
        kinds = {"*": "p", "float": "f", "double": "d", "": "n"}
        letters = [
            next(letter for kind, letter in kinds.items() if kind in one)
            for one in takes.split(",")
        ]
        declared[name] = f"{'-' if returned == 'void' else 'n'} {''.join(letters)}"
    assert declared.pop("abi")
    assert declared == library._SIGNATURES


def test_wrong_arrays_are_refused_before_anything_is_written() -> None:
    numbers, indices = np.zeros(70, np.float32), np.zeros(140, np.int64)
    with pytest.raises(TypeError, match="int32"):
        binding.scatter_add(numbers, indices.astype(np.int32), numbers)
    with pytest.raises(TypeError, match="float64"):
        binding.scatter_add(numbers, indices[:70], numbers.astype(np.float64))
    with pytest.raises(TypeError, match="kind i or u"):
        binding.find_differing(numbers, numbers, indices)
    with pytest.raises(TypeError, match="width"):
        binding.find_differing(numbers.astype(np.int8), numbers.astype(np.int8), indices)
    with pytest.raises(TypeError, match="contiguous"):
        binding.indices_of_part(indices[::2], 1, 1, 0, indices[:70])
    indices.flags.writeable = False
    with pytest.raises(TypeError, match="writable"):
        binding.indices_of_part(indices, 1, 1, 0, indices)

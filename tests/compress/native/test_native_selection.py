"""Compiled kernels that find and keep: the same bits as numpy's and a second opinion's."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable

import kernels_reference as reference
import numpy as np
import pytest
from compress.native.kernel_vectors import (
    LANES,
    NUMBERS,
    SIZES,
    Array,
    assert_same,
    by_numpy,
    floats,
)
from hypothesis import given
from hypothesis import strategies as st

from topq_dist.compress.native import binding

SOME = st.sampled_from([0, 1, 2, 7, 8, 9, LANES - 1, LANES, LANES + 1, 200, 1_000])
INTEGERS = ["i2", "i4", "i8"]


def aligned(size: int, dtype: str) -> Array:
    room = np.empty(size * np.dtype(dtype).itemsize + LANES, np.uint8)
    start = -room.ctypes.data % LANES
    return room[start : start + size * np.dtype(dtype).itemsize].view(dtype)


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

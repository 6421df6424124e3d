"""Compiled kernels that add up, bound, split and move: the same bits as numpy's and another's."""

from __future__ import annotations

import re
from typing import Any

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
from native_build import SOURCES

from topq_dist.compress.native import binding, library


def lists_of(dtype: str, numel: int, lists: int, seed: int) -> tuple[list[Array], list[Array]]:
    """Return sparse vectors' indices and values."""
    generator = np.random.default_rng(seed)
    terms = [
        np.sort(generator.choice(numel, min(numel, int(generator.integers(0, numel + 1))), False))
        for _ in range(lists)
    ]
    return terms, [floats(dtype, part.size, seed + 1, finite=True) for part in terms]


def added_up(dtype: str, numel: int, terms: list[Array], summands: list[Array]) -> Array:
    """Return the sum of sparse vectors, as numpy adds them."""
    return reference.add_terms(
        np.zeros(numel, dtype), np.concatenate(terms), np.concatenate(summands)
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("replace", [False, True])
def test_update_residual_span(size: int, dtype: str, replace: bool) -> None:
    indices = np.flatnonzero(np.random.default_rng(3).random(size) < 0.02)
    rest = floats(dtype, indices.size, 4)
    terms, summands = lists_of(dtype, size, 3, 5)
    ends = np.array([part.size for part in terms])
    found = []
    for update_residual in (binding.update_residual_span, by_numpy.update_residual_span):
        residual, gradient = floats(dtype, size, 1), floats(dtype, size, 2)
        next_term = np.zeros(3, np.int64) if replace else ends.copy()
        later = [part + 9 for part in terms]
        args = (indices + 9, rest, replace, later, summands, next_term, ends)
        assert update_residual(residual, gradient, 9, *args)
        assert next_term.tolist() == ends.tolist()
        found.append((residual, gradient))
    for ours, theirs in zip(*found, strict=True):
        assert_same(ours, theirs)
    before = floats(dtype, size, 1), floats(dtype, size, 2)
    assert_same(found[0][0], reference.update_residual(*before, indices, rest))
    sums = added_up(dtype, size, terms, summands)
    assert_same(found[0][1], sums if replace else before[1])


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("wrong", [[-1], [5, 5, 4], [10], [2**40], [-(2**63)]])
def test_what_is_out_of_order_or_range_is_not_written(dtype: str, wrong: list[int]) -> None:
    indices, rest = np.array(wrong), np.ones(len(wrong), dtype)
    none, nothing = np.zeros(0, np.int64), np.zeros(0, dtype)
    room, more = np.zeros(12, dtype), np.zeros(10, dtype)
    update_residual = binding.update_residual_span
    if wrong != [5, 5, 4]:
        args: tuple[Any, ...] = ([], [], none, none)
        assert not update_residual(room[1:11], more, 0, indices, rest, False, *args)
        assert not binding.scatter_add(room[1:11], indices, rest)
    next_term, ends = np.zeros(1, np.int64), np.array([len(wrong)])
    gradient = np.zeros(12, dtype)
    terms = (True, [indices], [rest], next_term, ends)
    done = update_residual(room[1:11], gradient[1:11], 0, none, nothing, *terms)
    assert done == (wrong == [5, 5, 4])
    assert not room.any()
    assert not gradient[[0, 11]].any()
    window = np.zeros(4, dtype)
    listed, numbers = np.empty(99, np.int64), np.empty(99, f"i{window.itemsize}")
    count = binding.sum_terms(
        [indices], [rest], np.zeros(1, np.int64), ends, 10, window, numbers, 1, listed, numbers
    )
    assert (count == -1) == (wrong != [5, 5, 4])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", NUMBERS)
def test_sum_terms(size: int, dtype: str) -> None:
    terms, summands = lists_of(dtype, size, 3, 5)
    ends = np.array([part.size for part in terms])
    bits = np.dtype(f"i{dtype[1]}")
    for window_numel in (1, 100, 16_384) if size <= 1_000 else (16_384,):
        found = []
        for add_up in (binding.sum_terms, by_numpy.sum_terms):
            window = np.empty(window_numel, dtype)
            indices = np.empty(int(ends.sum()) + LANES, np.int64)
            numbers = np.empty(indices.size, dtype)
            count = add_up(
                terms,
                summands,
                np.zeros(3, np.int64),
                ends,
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
        total = added_up(dtype, size, terms, summands)
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

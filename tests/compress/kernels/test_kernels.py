import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from topq_dist.compress.codec.frame import Frame
from topq_dist.compress.kernels import LANES, find_differing, find_reaching, keep_largest
from topq_dist.compress.residual import update_residual

SIZES = st.integers(0, 3 * LANES + 5)
KEYS = st.sampled_from(["u2", "u4", "u8"]).flatmap(
    lambda dtype: arrays.arrays(
        dtype,
        st.integers(1, 300),
        # with the sign cleared, and often alike
        elements=st.integers(0, int(np.iinfo(dtype).max) // 2) | st.integers(0, 3),
    )
)


def floats(dtype: str, size: int, seed: int) -> npt.NDArray[np.floating]:
    drawn = np.random.default_rng(seed).standard_normal(size) * 3
    return np.round(drawn).astype(dtype)  # with zeros, and with ties


@given(size=SIZES, seed=st.integers(0, 99), dtype=st.sampled_from(["f2", "f4", "f8"]))
def test_elements_that_reach_a_key_are_found_in_order(size: int, seed: int, dtype: str) -> None:
    vector = floats(dtype, size, seed)
    bits = vector.view(f"i{vector.itemsize}")
    low = np.abs(np.array([2.0], vector.dtype)).view(bits.dtype)[0]
    expected = np.flatnonzero(np.abs(vector) >= 2.0)
    indices, numbers = np.empty(size + LANES, np.int64), np.empty(size + LANES, bits.dtype)
    assert find_reaching(bits, None, low, 7, indices, numbers, 0, None, None) == expected.size
    np.testing.assert_array_equal(indices[: expected.size], expected + 7)
    np.testing.assert_array_equal(numbers[: expected.size], bits[expected])


@given(size=SIZES, seed=st.integers(0, 99), dtype=st.sampled_from(["f4", "f8"]))
def test_sums_that_reach_a_key_are_found_with_their_values(
    size: int, seed: int, dtype: str
) -> None:
    vector, residual = floats(dtype, size, seed), floats(dtype, size, seed + 100)
    total = vector + residual
    low = np.array([2.0], dtype).view(f"i{vector.itemsize}")[0]
    expected = np.flatnonzero(np.abs(total) >= 2.0)
    indices, numbers = np.empty(size + LANES, np.int64), np.empty(size + LANES, dtype)
    assert find_reaching(vector, residual, low, 0, indices, numbers, 0, None, None) == expected.size
    np.testing.assert_array_equal(indices[: expected.size], expected)
    np.testing.assert_array_equal(numbers[: expected.size], total[expected])


@pytest.mark.parametrize("size", [LANES, 10 * LANES, 10 * LANES + 3])
def test_a_search_stops_before_it_runs_out_of_room(size: int) -> None:
    vector = np.ones(size, np.float32).view(np.int32)
    room = 3 * LANES
    # what lies behind the room is not the kernel's
    indices, numbers = np.full(room + 1, -1, np.int64), np.full(room + 1, -1, np.int32)
    found = find_reaching(
        vector, None, np.int32(1), 0, indices[:room], numbers[:room], 0, None, None
    )
    assert min(size, room - LANES) <= found <= room
    assert indices[room] == numbers[room] == -1


@given(KEYS, st.integers(1, 40), st.data())
def test_the_largest_are_kept_and_the_first_of_the_ties(
    keys: npt.NDArray[np.unsignedinteger], counts: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, keys.size))
    sign = keys.dtype.type(data.draw(st.integers(0, 1)) << (8 * keys.itemsize - 1))
    magnitude = keys.dtype.type(np.iinfo(keys.dtype).max // 2)
    indices, bits = np.arange(keys.size, dtype=np.int64) * 3, keys | sign
    near, kept_bits = np.empty(keys.size, keys.dtype), np.empty(k + 1, keys.dtype)
    kept, counted = np.empty(k + 1, np.int64), np.empty(counts, np.int64)
    kth, highest = keep_largest(indices, bits, magnitude, k, counted, near, kept, kept_bits)
    expected = np.sort(np.lexsort((np.arange(keys.size), -keys.astype(object)))[:k])
    assert (kth, highest) == (keys[expected].min(), keys.max())
    np.testing.assert_array_equal(kept[:k], indices[expected])
    np.testing.assert_array_equal(kept_bits[:k], keys[expected] | sign)


@given(
    size=SIZES, seed=st.integers(0, 99), width=st.sampled_from([2, 4, 8]), room=st.integers(0, 99)
)
def test_where_two_vectors_differ(size: int, seed: int, width: int, room: int) -> None:
    generator = np.random.default_rng(seed)
    ours, theirs = (generator.integers(0, 2, size).astype(f"u{width}") for _ in range(2))
    expected = np.flatnonzero(ours != theirs)
    indices = np.full(room + 1, -1, np.int64)
    count = find_differing(ours, theirs, indices[:room])
    assert indices[room] == -1
    if expected.size > room:
        assert count == -1
    else:
        np.testing.assert_array_equal(indices[:count], expected)


@pytest.mark.parametrize("index", [-1, 5, 2**40])
def test_indices_out_of_range_are_an_error_and_never_written(index: int) -> None:
    at, value = torch.tensor(sorted([1, index])), torch.ones(2)
    with pytest.raises(IndexError, match="frame"):
        Frame(numel=5, indices=at, values=value, finite=True).add_to(torch.zeros(5))
    with pytest.raises(ValueError, match="indices"):
        update_residual(torch.zeros(5), torch.zeros(5), at, value)
    terms = [Frame(numel=5, indices=at, values=value, finite=True)]
    with pytest.raises(ValueError, match="indices"):
        update_residual(torch.zeros(5), torch.zeros(5), at[:0], value[:0], replace_by=terms)

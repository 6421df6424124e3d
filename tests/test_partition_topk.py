"""The k largest of each row, checked against sorting."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from topq_dist import partition_topk

BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def magnitude_keys(rows: Tensor) -> npt.NDArray[np.int64]:
    """Return integers that sort as magnitudes do, NaN last."""
    bits = rows.contiguous().view(BITS[rows.dtype])
    return (bits & torch.iinfo(bits.dtype).max).to(torch.int64).numpy()


def assert_keeps_exactly_the_top(rows: Tensor, k: int) -> None:
    before = rows.clone()
    partition_topk.keep_top_(rows, k)
    n_rows, n = rows.shape
    was, now = before.contiguous().view(BITS[rows.dtype]), rows.contiguous().view(BITS[rows.dtype])
    assert bool(((now == was) | (now == 0)).all()), "a kept element changed, or another is not +0"
    expected = np.zeros((n_rows, n), np.int64)
    expected[:, :k] = -np.sort(-magnitude_keys(before), axis=1)[:, :k]
    assert np.array_equal(-np.sort(-magnitude_keys(rows), axis=1), expected)


def random_rows(kind: str, shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 6e-8, -1e-310, 1.0])
    rows = {
        "normal": normal,
        "ties": (normal * 2).round(),
        "mostly zero": torch.where(normal.abs() > 1.5, normal, 0.0),
        "constant": torch.full(shape, -1.5, dtype=torch.float64),
        "wide": normal * 10.0 ** (10 * normal),
        "special": torch.where(
            normal > 0.5,
            special.double()[torch.randint(len(special), shape, generator=generator)],
            normal,
        ),
        "ramp": torch.arange(math.prod(shape), dtype=torch.float64).view(shape),
    }[kind]
    return rows.to(dtype)


KINDS = ("normal", "ties", "mostly zero", "constant", "wide", "special", "ramp")


@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(list(BITS)),
    n_rows=st.integers(0, 40),
    n=st.integers(0, 700),
    density=st.floats(0.0, 1.0) | st.floats(0.0, 0.05),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_exactly_the_top_of_each_row_stays(
    kind: str, dtype: torch.dtype, n_rows: int, n: int, density: float, seed: int
) -> None:
    assert_keeps_exactly_the_top(random_rows(kind, (n_rows, n), dtype, seed), round(density * n))


@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(list(BITS)),
    n_rows=st.integers(1, 6),
    n=st.integers(1, 700),
    k=st.integers(0, 60),
    block=st.integers(16, 300),
    segment=st.sampled_from([1, 2, 4, 8, 16]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=250, deadline=None)
def test_so_it_does_whatever_the_cut_into_blocks_and_segments(
    kind: str,
    dtype: torch.dtype,
    n_rows: int,
    n: int,
    k: int,
    block: int,
    segment: int,
    seed: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition_topk, "_BLOCK", block)
        patch.setattr(partition_topk, "_SHORT_ROW", 1)
        patch.setattr(partition_topk, "_segment_length", lambda n, k: segment)
        assert_keeps_exactly_the_top(random_rows(kind, (n_rows, n), dtype, seed), min(k, n))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 300, 3_000, 30_000, 299_999])
def test_rows_longer_than_a_block(kind: str, k: int) -> None:
    assert_keeps_exactly_the_top(random_rows(kind, (1, 300_000), torch.float32, seed=k), k)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_elements_rank_by_absolute_value(dtype: torch.dtype) -> None:
    rows = torch.tensor([[3 + 4j, 1, -6, 2j, 5.5j]], dtype=dtype)
    partition_topk.keep_top_(rows, 2)
    assert rows.tolist() == [[0, 0, -6, 0, 5.5j]]


@pytest.mark.parametrize("k", [3, 40])
def test_rows_of_any_strides_are_written_in_place(k: int) -> None:
    storage = torch.randn(3, 64, 50, generator=torch.Generator().manual_seed(0))
    rows = storage.permute(2, 0, 1)[:, 1]
    expected = rows.clone()
    partition_topk.keep_top_(expected, k)
    beside = storage[[0, 2]].clone()
    partition_topk.keep_top_(rows, k)
    assert torch.equal(storage[1].T, expected)
    assert torch.equal(storage[[0, 2]], beside)


def test_autograd_is_told_of_the_change() -> None:
    x = torch.randn(2, 64, requires_grad=True)
    y = x * 2
    loss = (y * y).sum()
    partition_topk.keep_top_(y.detach(), 5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)


@pytest.mark.parametrize(("shape", "k"), [((4,), 1), ((2, 3, 4), 1), ((2, 3), 4), ((2, 3), -1)])
def test_rows_or_k_that_make_no_sense_are_refused(shape: tuple[int, ...], k: int) -> None:
    rows = torch.ones(shape)
    with pytest.raises(ValueError, match=r"expected (two dimensions|an integer in \[0, 3\])"):
        partition_topk.keep_top_(rows, k)
    assert torch.equal(rows, torch.ones(shape))

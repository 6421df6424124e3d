"""Bounding: values are clipped by the mean of those selected, and what is clipped stays."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from vectors import DTYPES, drawn

from topq_dist import Compressor
from topq_dist.compress.aggregate import decode_partition
from topq_dist.compress.codec.values import VALUE_FORMATS
from topq_dist.compress.compressor import TopKCompressor
from topq_dist.compress.layout import Layout
from topq_dist.compress.sparsify.segments import Segment

BOUNDS = st.sampled_from([1e-3, 0.5, 1.0, 1.5, 3.0, 1e30])
ROWS = st.tuples(st.integers(0, 4), st.integers(0, 40), st.floats(0, 1))


def segments_of(drawn_rows: list[tuple[int, int, float]]) -> list[Segment]:
    segments, start = [], 0
    for rows, row_numel, share in drawn_rows:
        k = round(share * row_numel)
        segments.append(Segment(start=start, rows=rows, row_numel=row_numel, k=k))
        start += rows * row_numel
    return segments


def layout_of(segments: list[Segment]) -> Layout:
    names = tuple(f"p{number}" for number in range(len(segments)))
    return Layout(
        names=names, shapes=tuple((segment.rows, segment.row_numel) for segment in segments)
    )


def heavy(seed: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Numbers of which a few are many times the others, in each dtype's range."""
    vector = drawn(seed, numel, torch.float64)
    return (vector * vector.abs().exp()).clamp(-1e4, 1e4).to(dtype)


def sum_of(frames: list[Tensor], numel: int, dtype: torch.dtype) -> Tensor:
    total = torch.zeros(numel, dtype=dtype)
    for frame in decode_partition(frames, numel=numel):
        frame.add_to(total)
    return total


@settings(max_examples=150, deadline=None)
# in fp64 a sum of few numbers may be off by more than its largest one's last place
@example(
    rows=[(3, 26, 0.0), (3, 40, 0.0), (2, 32, 0.4375)],
    dtype=torch.float64,
    bound=1.5,
    parts=1,
    seed=29366,
)
@given(
    rows=st.lists(ROWS, min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
    bound=BOUNDS,
    parts=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**31),
)
def test_each_row_is_clipped_and_nothing_is_lost(
    rows: list[tuple[int, int, float]], dtype: torch.dtype, bound: float, parts: int, seed: int
) -> None:
    segments, numel = segments_of(rows), sum(number * width for number, width, _ in rows)
    layout, wide = layout_of(segments), torch.float64 if dtype == torch.float64 else torch.float32
    lossless = "fp64" if wide == torch.float64 else "fp32"
    one = TopKCompressor(value_format=lossless, error_feedback=True, bound=bound)
    other = TopKCompressor(value_format=lossless, error_feedback=True)
    for step in range(3):
        gradient = heavy(seed + step, numel, dtype)
        if one.residuals.holds(layout):
            other.residuals.load_state_dict(one.residuals.state_dict())
        before = other.residuals.flat(layout, dtype=wide, device=gradient.device).clone()
        compressed = one.compress(gradient, layout, segments, parts=parts)
        sent = sum_of(compressed.frames, numel, wide)
        one.residuals.apply(compressed.update)
        # to the bit, however much is clipped
        assert torch.equal(sent + one.residuals.home(layout), gradient.to(wide) + before)
        selected = sum_of(
            other.compress(gradient, layout, segments, parts=parts).frames, numel, wide
        )
        for segment in segments:
            for row in range(segment.rows):
                where = slice(
                    segment.start + row * segment.row_numel,
                    segment.start + (row + 1) * segment.row_numel,
                )
                check_row(sent[where], selected[where], segment.k, bound)


def check_row(sent: Tensor, selected: Tensor, k: int, bound: float) -> None:
    if k == 0 or 2 * k >= selected.numel():
        assert torch.equal(sent, selected)
        return
    # where half is sent it may go as it is
    if 2 * k >= selected.numel() and torch.equal(sent, selected):
        return
    limit = math.fsum(selected.double().abs().tolist()) * (bound / k)
    # rounded in the last place of the value that is clipped
    slack = torch.finfo(sent.dtype).eps * selected.double().abs() * 2
    # and each of the k - 1 sums in fp64's: as much as nothing beside fp32's
    slack += (k - 1) * torch.finfo(torch.float64).eps / 2 * limit
    expected = selected.double().clamp(-limit, limit)
    assert bool(((sent.double() - expected).abs() <= slack).all())
    clearly = selected.double().abs() < limit * (1 - 1e-6)
    assert torch.equal(sent[clearly], selected[clearly])
    assert bool((sent * selected >= 0).all())


@settings(max_examples=60, deadline=None)
@given(
    value_format=st.sampled_from(VALUE_FORMATS),
    dtype=st.sampled_from(DTYPES),
    numel=st.integers(0, 700),
    q=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_a_compressor_of_any_format_keeps_what_it_clips(
    value_format: str, dtype: torch.dtype, numel: int, q: float, seed: int
) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    compressor = Compressor(q=q, value_format=value_format, bound=1.5)
    left = torch.zeros(numel, dtype=wide)
    for step in range(3):
        gradient = heavy(seed + step, numel, dtype)
        sent = compressor.decompress(
            compressor.compress("w", gradient), torch.empty(numel, dtype=torch.float64)
        )
        whole, residual = gradient.to(wide) + left, compressor.state_dict()["w"]
        expected = (whole.double() - sent).to(wide)
        assert torch.equal(residual, torch.where(sent != 0, expected, whole))
        left = residual


def test_two_ways_of_one_segment_are_one() -> None:
    for dtype in DTYPES:
        gradient = heavy(4, 3_000, dtype)
        layout = Layout(names=("w",), shapes=((3_000,),))
        segment = Segment(start=0, rows=1, row_numel=3_000, k=90)
        one, other = (
            TopKCompressor(value_format="int2", error_feedback=True, bound=2.0) for _ in range(2)
        )
        for _ in range(3):
            compressed = one.compress(gradient, layout, [segment])
            one.residuals.apply(compressed.update)
            assert torch.equal(
                compressed.frames[0], other.compress_and_update(gradient, layout, 90)
            )
            assert torch.equal(one.residuals.home(layout), other.residuals.home(layout))


def test_what_is_half_sent_is_not_clipped() -> None:
    gradient = torch.tensor([1e-3, 5.0, -1e6, 1e-4])
    for q, missing in ((0.0, []), (0.5, [0, 3])):
        compressor = Compressor(q=q, value_format="fp32", bound=0.1)
        sent = compressor.decompress(compressor.compress("w", gradient), torch.empty(4))
        expected = gradient.clone()
        expected[missing] = 0.0
        assert torch.equal(sent, expected)
        assert torch.equal(compressor.state_dict()["w"], gradient - sent)


def test_numbers_near_the_ends_of_the_range_are_no_trouble() -> None:
    for top in (1e308, 5e-324):
        gradient = torch.tensor([top, top, -top, 0.0, 0.0, 0.0], dtype=torch.float64)
        compressor = Compressor(q=0.6, value_format="fp64", bound=0.5)
        frame = compressor.compress("w", gradient)
        sent = compressor.decompress(frame, torch.empty(6, dtype=torch.float64))
        assert torch.equal(sent + compressor.state_dict()["w"], gradient)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_told_as_ever(bad: float) -> None:
    compressor = Compressor(q=0.5, bound=1.0)
    frame = compressor.compress("w", torch.tensor([1.0, bad, 3.0, 4.0]))
    assert not compressor.decompress(frame, torch.empty(4)).isfinite().any()


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan, math.inf, True, "2", [1.0]])
def test_a_bound_that_is_none_is_named(bound: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="bound="):
        TopKCompressor(value_format=None, error_feedback=True, bound=bound)
    with pytest.raises((TypeError, ValueError), match="bound="):
        Compressor(bound=bound)


def test_a_bound_needs_feedback_and_is_among_the_settings() -> None:
    with pytest.raises(ValueError, match=r"bound=2.0 with error_feedback=False: expected None"):
        Compressor(error_feedback=False, bound=2.0)
    texts = {
        TopKCompressor(value_format="int2", error_feedback=True, bound=bound).settings()
        for bound in (None, 1.0, 2, 3.5)
    }
    assert len(texts) == 4

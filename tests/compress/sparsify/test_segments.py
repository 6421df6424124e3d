"""All segments of a vector at once, compared with one after the other."""

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from vectors import DTYPES, drawn

from topq_dist.compress.kernels import select_segments
from topq_dist.compress.layout import ChunkedVector
from topq_dist.compress.sparsify import segments as segments_module
from topq_dist.compress.sparsify import topk
from topq_dist.compress.sparsify.magnitude import CompensatedGradient, Selection
from topq_dist.compress.sparsify.segments import (
    Segment,
    Segments,
    SegmentSelector,
    UniformSegments,
    uniform_segments,
)
from topq_dist.compress.sparsify.threshold import find_candidates
from topq_dist.compress.sparsify.topk import Selector

pytestmark = pytest.mark.usefixtures("one_thread")


def segments_of(numels: list[int], fractions: list[float]) -> list[Segment]:
    segments, start = [], 0
    for numel, fraction in zip(numels, fractions, strict=True):
        k = min(numel, math.ceil(fraction * numel))
        segments.append(Segment(start=start, rows=1, row_numel=numel, k=k))
        start += numel
    return segments


class OneByOne:
    """The definition of SegmentSelector, without any of its ways of doing it."""

    def __init__(self) -> None:
        self._selectors: dict[int, Selector] = {}

    def select(
        self, gradient: Tensor, residual: Tensor | None, segments: list[Segment]
    ) -> Selection:
        parts = []
        for at, segment in enumerate(segments):
            its_residual = None if residual is None else residual[segment.where]
            selector = self._selectors.setdefault(at, Selector())
            parts.append(selector.select(gradient[segment.where], segment.k, residual=its_residual))
        return Selection(
            torch.cat(
                [
                    part.indices + segment.start
                    for part, segment in zip(parts, segments, strict=True)
                ]
            ),
            torch.cat([part.values for part in parts]),
            all(part.finite for part in parts),
        )


def assert_alike(one: Selection, other: Selection) -> None:
    assert one.finite == other.finite
    assert torch.equal(one.indices, other.indices)
    assert one.values.dtype == other.values.dtype
    assert torch.equal(one.values.nan_to_num(nan=7.0), other.values.nan_to_num(nan=7.0))


@given(
    numels=st.lists(st.sampled_from([1, 7, 64, 200, 4_096, 4_097, 9_000, 20_000]), min_size=1),
    fraction=st.sampled_from([0.0, 0.001, 0.01, 0.3, 1.0]),
    # from one step to the next: last step's threshold is far too high, or far too low
    scales=st.lists(st.sampled_from([0.0, 1e-3, 1.0, 1.0, 1e3]), min_size=2, max_size=4),
    dtype=st.sampled_from(DTYPES),
    feedback=st.booleans(),
    threads=st.sampled_from([1, 4, 6]),
    seed=st.integers(0, 1_000),
    data=st.data(),
)
def test_all_segments_at_once_are_the_same_as_one_by_one(
    numels: list[int],
    fraction: float,
    scales: list[float],
    dtype: torch.dtype,
    feedback: bool,
    threads: int,
    seed: int,
    data: st.DataObject,
) -> None:
    torch.set_num_threads(threads)
    numel = sum(numels)
    # one keeps what the others do not
    other = data.draw(st.integers(0, len(numels) - 1))
    fractions = [fraction] * len(numels)
    fractions[other] = data.draw(st.sampled_from([0.0, 0.01, 1.0]))
    segments = segments_of(numels, fractions)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    residual = drawn(seed + 100, numel, wide) if feedback else None
    ours, theirs = SegmentSelector(), OneByOne()
    for step, scale in enumerate(scales):
        gradient = drawn(seed + step, numel, dtype) * scale
        if step == 2:
            gradient[data.draw(st.integers(0, numel - 1))] = math.inf
        before = gradient.clone()
        picked = ours.select(ChunkedVector([gradient]), residual, segments)
        assert_alike(picked, theirs.select(gradient, residual, segments))
        assert torch.equal(gradient, before)


@pytest.mark.parametrize("threads", [1, 4])
def test_a_warm_step_is_one_call_a_thread_and_a_miss_one_pass_more(threads: int) -> None:
    torch.set_num_threads(threads)
    segments = segments_of([30_000, 1_000, 30_000, 500], [0.01] * 4)
    selector, residual = SegmentSelector(), torch.zeros(61_500)
    gradient = drawn(2, 61_500, torch.float32)
    calls: list[int] = []

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(vector: Any, *args: Any) -> Any:
            calls.append(vector.numel if isinstance(vector, CompensatedGradient) else vector.size)
            return call(vector, *args)

        return counting

    def passes(gradient: Tensor) -> list[int]:
        calls.clear()
        selector.select(ChunkedVector([gradient]), residual, segments)
        return sorted(calls)

    with (
        mock.patch.object(topk, "find_candidates", counted(find_candidates)),
        mock.patch.object(segments_module, "select_segments", counted(select_segments)),
    ):
        assert passes(gradient) == [30_000, 30_000]
        warm = [61_500] if threads == 1 else [30_000, 31_500]
        assert passes(gradient) == warm
        gradient[segments[2].where] /= 1e3
        assert passes(gradient) == sorted([*warm, 30_000])
        assert passes(gradient) == warm


def test_accumulating_with_a_threshold_that_misses_takes_one_pass_more() -> None:
    selector, residual = Selector(), torch.zeros(50_000)
    passes = mock.Mock(side_effect=find_candidates)
    with mock.patch.object(topk, "find_candidates", passes):
        for scale, count in ((1.0, 1), (1.0, 1), (1e-3, 2), (1e6, 2)):
            residual.zero_()
            passes.reset_mock()
            with selector.accumulate_and_select(
                residual, drawn(2, 50_000, torch.float32) * scale, 50
            ):
                pass
            assert passes.call_count == count


def test_what_does_not_fit_is_refused() -> None:
    segments = segments_of([10, 10], [0.1, 0.1])
    for gradient, residual in (
        (torch.ones(20), torch.ones(19)),
        (torch.ones(20), torch.ones(20, dtype=torch.float64)),
        (torch.ones(40)[::2], None),
        (torch.ones(20, dtype=torch.int32), None),
    ):
        with pytest.raises(ValueError, match=r"expected"):
            SegmentSelector().select(ChunkedVector([gradient]), residual, segments)
    for k in (-1, 21):
        with pytest.raises(ValueError, match=rf"k={k}: expected a number in \[0, 20\]"):
            Segment(start=0, rows=1, row_numel=20, k=k)


def test_uniform_segments_are_made_once_while_their_settings_stay() -> None:
    made = UniformSegments()
    first = made.of((5, 70), q=0.9, scope="parameter")
    assert first == tuple(uniform_segments((5, 70), q=0.9, scope="parameter"))
    assert made.of((5, 70), q=0.9, scope="parameter") is first
    assert Segments.of(first) is first
    assert [segment.k for segment in made.of((5, 70), q=0.5, scope="parameter")] == [2, 35]
    assert made.of((5, 70), q=0.5, scope="bucket").table.tolist() == [[0, 1, 75, 38]]
    with pytest.raises(ValueError, match="q"):
        made.of((5, 70), q=1.5, scope="parameter")


def test_tables_of_segments() -> None:
    segments = Segments.of(
        [
            Segment(start=0, rows=2, row_numel=3, k=1),
            Segment(start=6, rows=1, row_numel=9_000, k=5),
            Segment(start=9_006, rows=1, row_numel=9_000, k=0),
        ]
    )
    assert segments.ends.tolist() == [2, 7, 7]
    assert not segments.in_single_rows
    assert segments.large == [1]

"""Segments of a flat vector, of each of which the top-Q part is sent, and their selection."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from topq_dist.compress.kernels.jit import LANES
from topq_dist.compress.kernels.scratch import scratch
from topq_dist.compress.kernels.select import select_segments
from topq_dist.compress.kernels.threads import run_all, thread_count
from topq_dist.compress.layout import ChunkedVector
from topq_dist.compress.sparsify.magnitude import CompensatedGradient, Selection, check_vectors
from topq_dist.compress.sparsify.threshold import most_candidates
from topq_dist.compress.sparsify.topk import Selector, select_rows
from topq_dist.dtypes import FLOATS, Indices, Keys, bits_of, sign_cleared, tensor_of
from topq_dist.sparsity import at_least_one
from topq_dist.validation import check_fraction

# how much larger than its share of the vector what one thread gets may be
_LARGEST_SHARE = 1.5


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A slice of a flat vector seen as (rows, row_numel), of each row of which k are selected."""

    start: int
    rows: int
    row_numel: int
    k: int

    def __post_init__(self) -> None:
        if not 0 <= self.k <= self.row_numel:
            raise ValueError(f"k={self.k!r}: expected a number in [0, {self.row_numel}]")

    @property
    def where(self) -> slice:
        """Where in the flat vector the segment lies."""
        return slice(self.start, self.start + self.rows * self.row_numel)


def count_between(ascending: Tensor, ends: Sequence[int] | Indices) -> Indices:
    """Return how many of these numbers lie below each end, and not below the one before."""
    return np.diff(np.searchsorted(ascending.numpy(), ends), prepend=0)


class SegmentSelector:
    """Selects from the segments of one flat vector, step after step."""

    def __init__(self) -> None:
        self._selectors: list[Selector] = []

    def select(
        self, gradient: ChunkedVector, residual: Tensor | None, segments: Sequence[Segment]
    ) -> Selection:
        """Return the largest of each row of gradient + residual; change neither.

        `segments` cover the vector in order, each within a chunk. The indices are those in the
        whole vector, ascending. Dtypes, and what it raises, are as for Selector.select.
        """
        missing = len(segments) - len(self._selectors)
        self._selectors.extend(Selector() for _ in range(missing))
        at_once = self._select_at_once(gradient, residual, segments)
        if at_once is not None:
            return at_once
        selected = [
            _select_one(selector, gradient, residual, segment)
            for segment, selector in zip(segments, self._selectors, strict=False)
        ]
        finite = all(selection.finite for selection in selected)
        if len(segments) == 1 and segments[0].start == 0:
            return Selection(selected[0].indices.cpu(), selected[0].values.cpu(), finite)
        indices = torch.cat(
            [s.indices + segment.start for s, segment in zip(selected, segments, strict=True)]
        )
        values = torch.cat([selection.values for selection in selected])
        return Selection(indices.cpu(), values.cpu(), finite)

    def _select_at_once(
        self, gradient: ChunkedVector, residual: Tensor | None, segments: Sequence[Segment]
    ) -> Selection | None:
        """Do what select does in one compiled call a thread, or return None where that cannot be.

        It cannot for a vector in chunks, on another device, in rows, narrower than its residual and
        longer than a block, or not to be divided well; nor before every segment has a threshold.
        """
        whole = gradient.whole
        if (
            whole is None
            or whole.device.type != "cpu"
            or any(segment.rows != 1 for segment in segments)
        ):
            return None
        check_vectors(whole, residual)
        vector = CompensatedGradient(whole, residual)
        lows = [
            selector.first_key(segment.k, segment.row_numel, vector.dtype)
            for segment, selector in zip(segments, self._selectors, strict=False)
        ]
        groups = _groups(segments, thread_count())
        if None in lows or groups is None or vector.largest_slice < vector.numel:
            return None
        keys = np.array(lows, f"i{vector.dtype.itemsize}")
        found = run_all(
            [partial(_select_group, vector, segments[one], keys[one]) for one in groups]
        )
        indices = _joined([group.indices for group in found])
        bits = _joined([group.bits for group in found])
        finite, start = True, 0
        for at, (reached, kth, highest) in enumerate(o for group in found for o in group.outcomes):
            segment, selector = segments[at], self._selectors[at]
            stop = start + segment.k
            if not segment.k:
                finite &= reached == 0
            elif segment.k <= reached <= most_candidates(segment.k):
                finite &= selector.remember(kth, highest, vector.dtype)
            else:
                # last step's threshold has missed
                selected = _select_one(selector, gradient, residual, segment, missed=lows[at])
                indices[start:stop] = selected.indices.numpy()
                indices[start:stop] += segment.start
                bits[start:stop] = bits_of(selected.values)
                finite &= selected.finite
            start = stop
        return Selection(torch.from_numpy(indices), tensor_of(bits, vector.dtype), finite)


class _Found(NamedTuple):
    """The largest of a group's segments, a gap where they have not been found.

    An outcome is how many elements reached the threshold, the k-th key and the highest.
    """

    indices: Indices
    bits: Keys
    outcomes: list[list[int]]


def _select_group(
    vector: CompensatedGradient, segments: Sequence[Segment], keys: npt.NDArray[np.signedinteger]
) -> _Found:
    start, stop = segments[0].start, segments[-1].where.stop
    numbers, residual = vector.operands(start, stop)
    plan = [
        (segment.start - start, segment.where.stop - start, segment.k, most_candidates(segment.k))
        for segment in segments
    ]
    k = sum(segment.k for segment in segments)
    room = max(min(limit, high - low) for low, high, _, limit in plan) + 1 + LANES
    key_dtype = np.dtype(FLOATS[vector.dtype].key)
    indices, listed = scratch.listing(room, numbers.dtype)
    _, bits = scratch.listing(room, key_dtype)
    top, top_bits = np.empty(k + 1, np.int64), np.empty(k + 1, key_dtype)
    outcomes = np.zeros((len(segments), 3), np.int64)
    select_segments(
        numbers,
        residual,
        start,
        np.array(plan, np.int64),
        keys,
        sign_cleared(vector.dtype),
        (indices, listed, bits, np.empty(room, key_dtype), scratch.counts),
        top,
        top_bits,
        outcomes,
    )
    return _Found(top[:k], top_bits[:k], outcomes.tolist())


def _groups(segments: Sequence[Segment], threads: int) -> list[slice] | None:
    """Return segments for each thread, about alike in size; None where that cannot be."""
    ends = list(accumulate(segment.row_numel for segment in segments))
    share = ends[-1] / threads
    edges = [0, *(bisect_right(ends, share * part) for part in range(1, threads)), len(segments)]
    groups = [slice(low, high) for low, high in pairwise(edges) if low < high]
    largest = max(sum(segment.row_numel for segment in segments[group]) for group in groups)
    return groups if largest <= _LARGEST_SHARE * share else None


def _select_one(
    selector: Selector,
    gradient: ChunkedVector,
    residual: Tensor | None,
    segment: Segment,
    *,
    missed: int | None = None,
) -> Selection:
    vector = gradient[segment.where]
    if residual is not None:
        residual = residual[segment.where]
    if segment.rows == 1:
        return selector.select(vector, segment.k, residual=residual, missed=missed)
    matrix = (segment.rows, segment.row_numel)
    residual = None if residual is None else residual.view(matrix)
    return select_rows(vector.view(matrix), segment.k, residual=residual)


def _joined(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


Scope = Literal["parameter", "bucket"]


def check_scope(scope: Scope) -> Scope:
    """Return `scope` where it is one; raises ValueError."""
    if scope not in get_args(Scope):
        raise ValueError(f"scope={scope!r}: expected one of {', '.join(get_args(Scope))}")
    return scope


def uniform_segments(numels: Sequence[int], *, q: float, scope: Scope) -> list[Segment]:
    """Return the segments of a flat vector of tensors of these sizes, one a tensor or one for all.

    At least one element of each is selected unless q is 1, so that no bias is left behind for good.
    """
    check_fraction("q", q)
    if check_scope(scope) == "bucket":
        numels = [sum(numels)]
    segments, start = [], 0
    for numel in numels:
        segments.append(Segment(start=start, rows=1, row_numel=numel, k=at_least_one(q, numel)))
        start += numel
    return segments

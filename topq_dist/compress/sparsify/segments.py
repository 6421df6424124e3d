"""Segments of a flat vector, of each of which the top-Q part is sent, and their selection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate, groupby, pairwise
from operator import itemgetter
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from topq_dist.compress.kernels import LANES, select_segments
from topq_dist.compress.kernels.scratch import scratch
from topq_dist.compress.kernels.threads import run_all, thread_count
from topq_dist.compress.layout import ChunkedVector
from topq_dist.compress.sparsify.magnitude import CompensatedGradient, Selection, check_vectors
from topq_dist.compress.sparsify.threshold import most_candidates
from topq_dist.compress.sparsify.topk import SMALL_NUMEL, Selector, select_rows
from topq_dist.dtypes import FLOATS, Indices, Keys, bits_of, key_of, sign_cleared, tensor_of
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


class Segments(tuple[Segment, ...]):
    """Segments that cover a flat vector in order, and what they hold as arrays, made once."""

    @staticmethod
    def of(segments: Sequence[Segment]) -> Segments:
        """Return segments as Segments: those that are such already, themselves."""
        return segments if isinstance(segments, Segments) else Segments(segments)

    def without(self, places: Sequence[bool]) -> Segments:
        """Return these segments, of some of which nothing is selected."""
        pairs = zip(self, places, strict=True)
        return Segments(replace(one, k=0) if out else one for one, out in pairs)

    @cached_property
    def table(self) -> Indices:
        """start, rows, row_numel and k of each: int64 (segments, 4)."""
        rows = [(one.start, one.rows, one.row_numel, one.k) for one in self]
        return np.array(rows, np.int64).reshape(-1, 4)

    @cached_property
    def ks(self) -> Indices:
        """How many elements are selected of each segment."""
        return self.table[:, 1] * self.table[:, 3]

    @cached_property
    def ends(self) -> Indices:
        """How many elements are selected of each segment and those before it."""
        return np.cumsum(self.ks)

    @cached_property
    def in_single_rows(self) -> bool:
        """Whether each has one row."""
        return bool((self.table[:, 1] == 1).all())

    @cached_property
    def large(self) -> list[int]:
        """The places of those that a threshold is remembered for."""
        return np.flatnonzero((self.table[:, 2] > SMALL_NUMEL) & (self.table[:, 3] > 0)).tolist()


def count_between(ascending: Indices, ends: Sequence[int] | Indices) -> Indices:
    """Return how many of these numbers lie below each end, and not below the one before."""
    counts = ascending.searchsorted(ends)
    counts[1:] -= counts[:-1].copy()
    return counts


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
        at_once = self._select_at_once(gradient, residual, Segments.of(segments))
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
        self, gradient: ChunkedVector, residual: Tensor | None, segments: Segments
    ) -> Selection | None:
        """Do what select does in one compiled call a thread, or return None where that cannot be.

        It cannot for a vector in chunks, on another device, in rows, narrower than its residual and
        longer than a block, or not to be divided well; nor before every segment has a threshold.
        Python does nothing for a segment unless it is large, or last step's threshold has missed.
        """
        whole = gradient.whole
        if whole is None or whole.device.type != "cpu" or not segments.in_single_rows:
            return None
        check_vectors(whole, residual)
        vector = CompensatedGradient(whole, residual)
        keys = self._first_keys(segments, vector.dtype)
        groups = _groups(segments, thread_count())
        if keys is None or groups is None or vector.largest_slice < vector.numel:
            return None
        found = run_all(
            [partial(_select_group, vector, segments.table[one], keys[one]) for one in groups]
        )
        indices = _joined([group.indices for group in found])
        bits = _joined([group.bits for group in found])
        reached, kth, highest = _joined([group.outcomes for group in found]).T
        k = segments.table[:, 3]
        hit = (k <= reached) & (reached <= most_candidates(k)) & (k > 0)
        finite = not reached[k == 0].any()
        finite &= bool((highest[hit] < key_of(np.inf, vector.dtype)).all())
        for at in segments.large:
            if hit[at]:
                self._selectors[at].remember(int(kth[at]), int(highest[at]), vector.dtype)
        for at in np.flatnonzero(~hit & (k > 0)).tolist():
            segment, missed, stop = segments[at], int(keys[at]), int(segments.ends[at])
            selected = _select_one(self._selectors[at], gradient, residual, segment, missed=missed)
            mine = slice(stop - segment.k, stop)
            indices[mine] = selected.indices.numpy()
            indices[mine] += segment.start
            bits[mine] = bits_of(selected.values)
            finite &= selected.finite
        return Selection(torch.from_numpy(indices), tensor_of(bits, vector.dtype), finite)

    def _first_keys(
        self, segments: Segments, dtype: torch.dtype
    ) -> npt.NDArray[np.signedinteger] | None:
        """Return the key that candidates of each segment reach; None where one has none yet."""
        keys = np.zeros(len(segments), f"i{dtype.itemsize}")
        keys[segments.table[:, 3] == 0] = key_of(np.inf, dtype)
        for at in segments.large:
            segment = segments[at]
            key = self._selectors[at].first_key(segment.k, segment.row_numel, dtype)
            if key is None:
                return None
            keys[at] = key
        return keys


class _Found(NamedTuple):
    """The largest of a group's segments, a gap where they have not been found.

    outcomes: int64 (segments, 3), how many elements reached the threshold, the k-th key and the
        highest.
    """

    indices: Indices
    bits: Keys
    outcomes: Indices


def _select_group(
    vector: CompensatedGradient, table: Indices, keys: npt.NDArray[np.signedinteger]
) -> _Found:
    starts, _, numels, ks = table.T
    start = int(starts[0])
    numbers, residual = vector.operands(start, int(starts[-1] + numels[-1]))
    limits = most_candidates(ks)
    plan = np.stack([starts - start, starts - start + numels, ks, limits], axis=1)
    k, room = int(ks.sum()), int(np.minimum(limits, numels).max()) + 1 + LANES
    key_dtype = np.dtype(FLOATS[vector.dtype].key)
    indices, listed = scratch.listing(room, numbers.dtype)
    _, bits = scratch.listing(room, key_dtype)
    top, top_bits = np.empty(k + 1, np.int64), np.empty(k + 1, key_dtype)
    outcomes = np.zeros((len(table), 3), np.int64)
    select_segments(
        numbers,
        residual,
        start,
        plan,
        keys,
        sign_cleared(vector.dtype),
        (indices, listed, bits, np.empty(room, key_dtype), scratch.counts),
        top,
        top_bits,
        outcomes,
    )
    return _Found(top[:k], top_bits[:k], outcomes)


def _groups(segments: Segments, threads: int) -> list[slice] | None:
    """Return segments for each thread, about alike in size; None where that cannot be."""
    ends = np.cumsum(segments.table[:, 2])
    share = ends[-1] / threads
    shares = share * np.arange(1, threads)
    edges = [0, *np.searchsorted(ends, shares, side="right").tolist(), len(segments)]
    groups = [slice(low, high) for low, high in pairwise(edges) if low < high]
    sizes = [ends[one.stop - 1] - (ends[one.start - 1] if one.start else 0) for one in groups]
    return groups if max(sizes) <= _LARGEST_SHARE * share else None


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


def uniform_segments(
    numels: Sequence[int], *, q: float, scope: Scope, left_out: Sequence[bool] = ()
) -> Segments:
    """Return the segments of a flat vector of tensors of these sizes, one a tensor or one for all.

    At least one element of each is selected unless q is 1, so that no bias is left behind for good.
    left_out: of which tensors nothing is selected; those between them are each other's bucket then.
    """
    check_fraction("q", q)
    tensors = list(zip(left_out or [False] * len(numels), numels, strict=True))
    if check_scope(scope) == "bucket":
        runs = groupby(tensors, key=itemgetter(0))
        tensors = [(left, sum(numel for _, numel in run)) for left, run in runs]
    starts = accumulate((numel for _, numel in tensors), initial=0)
    return Segments(
        Segment(start=start, rows=1, row_numel=numel, k=0 if left else at_least_one(q, numel))
        for start, (left, numel) in zip(starts, tensors, strict=False)
    )


class UniformSegments:
    """uniform_segments of the vectors of a model, made once while q and scope stay as they are."""

    def __init__(self) -> None:
        self._settings: tuple[float, Scope] | None = None
        self._made: dict[tuple[int, ...], Segments] = {}
        self._partly: dict[tuple[int, ...], tuple[tuple[bool, ...], Segments]] = {}

    def of(
        self,
        numels: tuple[int, ...],
        *,
        q: float,
        scope: Scope,
        left_out: tuple[bool, ...] = (),
    ) -> Segments:
        """Return the segments of tensors of these sizes, as `uniform_segments` does."""
        if (q, scope) != self._settings:
            self._settings, self._made, self._partly = (q, scope), {}, {}
        if left_out:
            # others may be left out in each step: the last ones alone are kept
            if numels not in self._partly or self._partly[numels][0] != left_out:
                made = uniform_segments(numels, q=q, scope=scope, left_out=left_out)
                self._partly[numels] = left_out, made
            return self._partly[numels][1]
        if numels not in self._made:
            self._made[numels] = uniform_segments(numels, q=q, scope=scope)
        return self._made[numels]

"""Selecting from every cut of a flat vector, one call of compiled code a thread where it can be."""

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
from topq_dist.compress.kernels.select import select_stretches
from topq_dist.compress.kernels.threads import run_all, thread_count
from topq_dist.compress.layout import Pieces
from topq_dist.compress.sparsify.magnitude import CompensatedGradient, Selection, check_vectors
from topq_dist.compress.sparsify.threshold import most_candidates
from topq_dist.compress.sparsify.topk import Selector, select_rows
from topq_dist.dtypes import FLOATS, Indices, Keys, bits_of, sign_cleared, tensor_of
from topq_dist.sparsity import at_least_one
from topq_dist.validation import check_fraction

# how much larger than its share of the vector what one thread gets may be
_LARGEST_SHARE = 1.5


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A stretch of a flat vector seen as (rows, row_numel), of each row of which `kept` survive."""

    start: int
    rows: int
    row_numel: int
    kept: int

    def __post_init__(self) -> None:
        if not 0 <= self.kept <= self.row_numel:
            raise ValueError(f"kept={self.kept!r}: expected a number in [0, {self.row_numel}]")

    @property
    def stretch(self) -> slice:
        """Where in the flat vector the cut lies."""
        return slice(self.start, self.start + self.rows * self.row_numel)


def count_between(ascending: Tensor, ends: Sequence[int] | Indices) -> Indices:
    """Return how many of these numbers lie below each end, and not below the one before."""
    return np.diff(np.searchsorted(ascending.numpy(), ends), prepend=0)


class CutSelector:
    """Selects from the cuts of one flat vector, step after step."""

    def __init__(self) -> None:
        self._selectors: list[Selector] = []

    def select(self, gradient: Pieces, residual: Tensor | None, cuts: Sequence[Cut]) -> Selection:
        """Return what survives of gradient + residual; change neither.

        `cuts` cover the vector in order, each within a piece. The indices are those in the whole
        vector, ascending. Dtypes, and what it raises, are as for Selector.select.
        """
        missing = len(cuts) - len(self._selectors)
        self._selectors.extend(Selector() for _ in range(missing))
        at_once = self._select_at_once(gradient, residual, cuts)
        if at_once is not None:
            return at_once
        selected = [
            _select_one(selector, gradient, residual, cut)
            for cut, selector in zip(cuts, self._selectors, strict=False)
        ]
        finite = all(selection.finite for selection in selected)
        if len(cuts) == 1 and cuts[0].start == 0:
            return Selection(selected[0].indices.cpu(), selected[0].values.cpu(), finite)
        indices = torch.cat([s.indices + cut.start for s, cut in zip(selected, cuts, strict=True)])
        values = torch.cat([selection.values for selection in selected])
        return Selection(indices.cpu(), values.cpu(), finite)

    def _select_at_once(
        self, gradient: Pieces, residual: Tensor | None, cuts: Sequence[Cut]
    ) -> Selection | None:
        """Do what select does in one call a thread, or return None where that cannot be.

        It cannot for a vector in pieces, on another device, in rows, narrower than its residual and
        longer than a block, or not to be divided well; nor before every cut has a threshold.
        """
        whole = gradient.whole
        if whole is None or whole.device.type != "cpu" or any(cut.rows != 1 for cut in cuts):
            return None
        check_vectors(whole, residual)
        vector = CompensatedGradient(whole, residual)
        lows = [
            selector.first_key(cut.kept, cut.row_numel, vector.dtype)
            for cut, selector in zip(cuts, self._selectors, strict=False)
        ]
        groups = _groups(cuts, thread_count())
        if None in lows or groups is None or vector.longest_stretch < vector.numel:
            return None
        keys = np.array(lows, f"i{vector.dtype.itemsize}")
        found = run_all([partial(_select_group, vector, cuts[one], keys[one]) for one in groups])
        indices = _joined([group.indices for group in found])
        bits = _joined([group.bits for group in found])
        finite, start = True, 0
        for at, (reached, kth, highest) in enumerate(o for group in found for o in group.outcomes):
            cut, selector = cuts[at], self._selectors[at]
            stop = start + cut.kept
            if not cut.kept:
                finite &= reached == 0
            elif cut.kept <= reached <= most_candidates(cut.kept):
                finite &= selector.remember(kth, highest, vector.dtype)
            else:
                # last step's threshold has missed
                selected = _select_one(selector, gradient, residual, cut, missed=lows[at])
                indices[start:stop] = selected.indices.numpy()
                indices[start:stop] += cut.start
                bits[start:stop] = bits_of(selected.values)
                finite &= selected.finite
            start = stop
        return Selection(torch.from_numpy(indices), tensor_of(bits, vector.dtype), finite)


class _Found(NamedTuple):
    """What the cuts of a group keep, a gap where it has not been found, and what each has come to.

    An outcome is how many elements reached the threshold, the k-th key and the highest.
    """

    indices: Indices
    bits: Keys
    outcomes: list[list[int]]


def _select_group(
    vector: CompensatedGradient, cuts: Sequence[Cut], keys: npt.NDArray[np.signedinteger]
) -> _Found:
    start, stop = cuts[0].start, cuts[-1].stretch.stop
    numbers, owed = vector.stretch(start, stop)
    plan = [
        (cut.start - start, cut.stretch.stop - start, cut.kept, most_candidates(cut.kept))
        for cut in cuts
    ]
    kept = sum(cut.kept for cut in cuts)
    room = max(min(limit, high - low) for low, high, _, limit in plan) + 1 + LANES
    key_dtype = np.dtype(FLOATS[vector.dtype].key)
    indices, listed = scratch.listing(room, numbers.dtype)
    _, bits = scratch.listing(room, key_dtype)
    kept_indices, kept_bits = np.empty(kept + 1, np.int64), np.empty(kept + 1, key_dtype)
    outcomes = np.zeros((len(cuts), 3), np.int64)
    select_stretches(
        numbers,
        owed,
        start,
        np.array(plan, np.int64),
        keys,
        sign_cleared(vector.dtype),
        (indices, listed, bits, np.empty(room, key_dtype), scratch.counts),
        kept_indices,
        kept_bits,
        outcomes,
    )
    return _Found(kept_indices[:kept], kept_bits[:kept], outcomes.tolist())


def _groups(cuts: Sequence[Cut], threads: int) -> list[slice] | None:
    """Return a stretch of cuts for each thread, about alike in size; None where they cannot be."""
    ends = list(accumulate(cut.row_numel for cut in cuts))
    share = ends[-1] / threads
    edges = [0, *(bisect_right(ends, share * part) for part in range(1, threads)), len(cuts)]
    groups = [slice(low, high) for low, high in pairwise(edges) if low < high]
    largest = max(sum(cut.row_numel for cut in cuts[group]) for group in groups)
    return groups if largest <= _LARGEST_SHARE * share else None


def _select_one(
    selector: Selector,
    gradient: Pieces,
    residual: Tensor | None,
    cut: Cut,
    *,
    missed: int | None = None,
) -> Selection:
    vector = gradient[cut.stretch]
    owed = None if residual is None else residual[cut.stretch]
    if cut.rows == 1:
        return selector.select(vector, cut.kept, residual=owed, missed=missed)
    matrix = (cut.rows, cut.row_numel)
    owed = None if owed is None else owed.view(matrix)
    return select_rows(vector.view(matrix), cut.kept, residual=owed)


def _joined(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


Scope = Literal["parameter", "bucket"]


def check_scope(scope: Scope) -> Scope:
    """Return `scope` where it is one; raises ValueError."""
    if scope not in get_args(Scope):
        raise ValueError(f"scope={scope!r}: expected one of {', '.join(get_args(Scope))}")
    return scope


def uniform_cuts(numels: Sequence[int], *, q: float, scope: Scope) -> list[Cut]:
    """Return the cuts of a flat vector of tensors of these sizes, one a tensor or one for all.

    At least one element of each is kept unless q is 1, so that no bias is left behind for good.
    """
    check_fraction("q", q)
    if check_scope(scope) == "bucket":
        numels = [sum(numels)]
    cuts, start = [], 0
    for numel in numels:
        cuts.append(Cut(start=start, rows=1, row_numel=numel, kept=at_least_one(q, numel)))
        start += numel
    return cuts

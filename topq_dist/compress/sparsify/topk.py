"""Exact top-k by magnitude of gradient + residual: exactly k elements, indices ascending.

One step's k-th magnitude is close to the last step's, so a pass over the vector finds only the few
candidates above a slightly lower threshold, and only those are partitioned. A wrong threshold
costs time, never exactness. Order is that of the bit patterns with the sign cleared: NaN above
infinity, denormals whole. Among equal magnitudes at the k-th place the lowest indices are selected.

Selecting changes nothing; updating the residual does, once the step is sure to count. Where it is
from the start, `accumulate_and_select` adds and selects in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from topq_dist.compress.kernels import keep_largest
from topq_dist.compress.kernels.scratch import BLOCK_NUMEL, blocks, scratch, spans
from topq_dist.compress.kernels.threads import run_all
from topq_dist.compress.sparsify.magnitude import (
    CompensatedGradient,
    Selection,
    UndoLog,
    check_vectors,
    not_finite_allowed,
)
from topq_dist.compress.sparsify.threshold import (
    Candidates,
    all_candidates,
    filled_with_zeros,
    find_candidates,
    most_candidates,
    partitioned_candidates,
    sampled_threshold,
)
from topq_dist.compress.sparsify.topk_torch import DeviceSelector, select_with_torch
from topq_dist.dtypes import (
    Indices,
    Keys,
    key_of,
    number_of,
    sign_cleared,
    tensor_of,
)
from topq_dist.partition_topk import top_indices

# up to here a partition of everything is cheaper than a search
SMALL_NUMEL = 4_096
# of all but zero
_SMALLEST_KEY = 1
# how far below last step's threshold to begin, as a fraction of it: the lower, the more candidates,
# but to have missed the k-th costs a second pass
_FIRST_SLACK = 0.03
_LARGEST_SLACK = 0.5
_SMALLEST_SLACK = 0.002


class Selector:
    """Selects from one named vector, step after step; remembers where last step's threshold lay.

    Scratch (for each thread one block, the candidates and, to accumulate a gradient, what the
    residual was) is shared by all selectors of a process. Distinct selectors may be used from
    distinct threads at once.
    """

    def __init__(self) -> None:
        self._threshold: float | None = None
        self._slack = _FIRST_SLACK
        self._on_device = DeviceSelector()

    def select(
        self, gradient: Tensor, k: int, *, residual: Tensor | None = None, missed: int | None = None
    ) -> Selection:
        """Return the k elements of gradient + residual largest in magnitude; change neither.

        `gradient` is 1-D, contiguous, of any float dtype; `residual`, where there is one, is like
        it but fp64 for an fp64 gradient and fp32 for every other. `missed` is a key that is known
        to be no good for a threshold. Raises ValueError for other vectors, or where k is not in
        [0, numel].
        """
        check_vectors(gradient, residual)
        _check_k(k, gradient.numel())
        if gradient.device.type != "cpu":
            return self._on_device.select(gradient, k, residual)
        vector = CompensatedGradient(gradient, residual)
        with not_finite_allowed():
            if k == 0:
                beyond = find_candidates(vector, key_of(np.inf, vector.dtype), limit=0).reached
                return _nothing(vector.dtype, finite=beyond == 0)
            small = vector.numel <= SMALL_NUMEL or k == vector.numel
            found = all_candidates(vector) if small else self._search(vector, k, missed)
        return self._largest_of(found, k, vector.dtype)

    @contextmanager
    def accumulate_and_select(
        self, residual: Tensor, gradient: Tensor, k: int
    ) -> Iterator[Selection]:
        """Within the block residual += gradient; give the residual's k elements of most magnitude.

        Both are as for `select`, on the CPU. The residual is what it was where the sum is not
        finite, or the block, in which this thread must not accumulate another, raises.
        """
        check_vectors(gradient, residual)
        _check_k(k, gradient.numel())
        vector = CompensatedGradient(gradient, residual)
        low, limit = self.first_key(k, vector.numel, vector.dtype), most_candidates(k)
        if k in (0, vector.numel):
            low, limit = key_of(np.inf, vector.dtype), 0
        elif low is None:
            with not_finite_allowed():
                low = sampled_threshold(vector, k)
        undo_log, finite = UndoLog(residual), False
        try:
            found = find_candidates(vector, low, limit, undo_log)
            if k == 0:
                selection = _nothing(vector.dtype, finite=found.reached == 0)
            elif k <= found.reached <= limit:
                selection = self._largest_of(found, k, vector.dtype)
            else:
                selection = self.select(residual, k, missed=low)
            yield selection
            finite = selection.finite
        finally:
            if not finite:
                undo_log.undo()

    def first_key(self, k: int, numel: int, dtype: torch.dtype) -> int | None:
        """Return the key that the k largest of a vector should reach, by last step's threshold.

        0 is for few elements, all of which may be looked at; None says that only a sample tells.
        """
        if k == 0:
            return key_of(np.inf, dtype)
        if numel <= SMALL_NUMEL:
            return 0
        if self._threshold is None or k == numel:
            return None
        # not below the smallest number there is, or zeros would be candidates
        return max(_SMALLEST_KEY, key_of(self._threshold * (1.0 - self._slack), dtype))

    def remember(self, kth: int, highest: int, dtype: torch.dtype) -> bool:
        """Return whether the highest key is finite, and if so remember the k-th."""
        if highest >= key_of(np.inf, dtype):
            return False
        threshold = number_of(kth, dtype)
        if self._threshold:
            drop = 1.0 - threshold / self._threshold
            slack = max(0.95 * self._slack, 2.0 * drop, _SMALLEST_SLACK)
            self._slack = min(slack, _LARGEST_SLACK)
        self._threshold = threshold
        return True

    def _search(self, vector: CompensatedGradient, k: int, missed: int | None) -> Candidates:
        """Return k candidates or more: by last step's threshold, by a sample's, or everything."""
        limit = most_candidates(k)
        warm = self.first_key(k, vector.numel, vector.dtype)
        for low in (warm, None):
            low = sampled_threshold(vector, k) if low is None else low
            # with the smallest key as a threshold the rest are zeros, which are quickly found
            if low == missed and low != _SMALLEST_KEY:
                continue
            found = find_candidates(vector, low, limit)
            if k <= found.reached <= limit:
                return found
            if found.reached < k and low == _SMALLEST_KEY:
                return filled_with_zeros(vector, found, k)
            missed = low
        return partitioned_candidates(vector, k)

    def _largest_of(self, candidates: Candidates, k: int, dtype: torch.dtype) -> Selection:
        """Keep the k largest candidates, and remember where the k-th lies."""
        indices, bits = candidates.indices, candidates.bits
        top, top_bits = np.empty(k + 1, np.int64), np.empty(k + 1, bits.dtype)
        near = np.empty(bits.size, bits.dtype)
        kth, highest = keep_largest(
            indices, bits, sign_cleared(dtype), k, scratch.counts, near, top, top_bits
        )
        finite = self.remember(kth, highest, dtype)
        return Selection(torch.from_numpy(top[:k]), tensor_of(top_bits[:k], dtype), finite)


def select_rows(matrix: Tensor, k: int, *, residual: Tensor | None = None) -> Selection:
    """Return exactly k elements of every row of matrix + residual, the largest in magnitude.

    `matrix` and `residual` are (N, n) and contiguous, of the dtypes that Selector.select takes.
    The result holds N * k elements at flat indices, ascending over the whole matrix. Raises
    ValueError otherwise, or where k is not in [0, n].
    """
    if matrix.dim() != 2:
        raise ValueError(f"matrix has shape {tuple(matrix.shape)}: expected (N, n)")
    rows, row_numel = matrix.shape
    _check_k(k, row_numel)
    gradient = matrix.reshape(-1)
    flat_residual = None if residual is None else residual.reshape(-1)
    check_vectors(gradient, flat_residual)
    if matrix.device.type != "cpu":
        return select_with_torch(gradient, k, residual=flat_residual, row_numel=row_numel)
    vector = CompensatedGradient(gradient, flat_residual)
    with not_finite_allowed():
        if k * rows == 0:
            beyond = find_candidates(vector, key_of(np.inf, vector.dtype), limit=0).reached
            return _nothing(vector.dtype, finite=beyond == 0)
        if k == row_numel:
            indices = np.arange(vector.numel, dtype=np.int64)
        else:
            parts = run_all(
                [
                    partial(_rows_of_span, vector, k, row_numel, *span)
                    for span in spans(rows, max(1, BLOCK_NUMEL // row_numel))
                ]
            )
            indices = np.concatenate(parts)
        bits = vector.bits_at(indices)
    finite = bool((bits & sign_cleared(vector.dtype)).max() < key_of(np.inf, vector.dtype))
    return Selection(torch.from_numpy(indices), tensor_of(bits, vector.dtype), finite)


def _rows_of_span(
    vector: CompensatedGradient, k: int, row_numel: int, first_row: int, end_row: int
) -> Indices:
    found = []
    with not_finite_allowed():
        for start, stop in blocks(
            first_row * row_numel, end_row * row_numel, max(1, BLOCK_NUMEL // row_numel) * row_numel
        ):
            rows = _keys_of_rows(vector, start, stop).reshape(-1, row_numel)
            indices = np.sort(top_indices(rows.view(f"i{rows.itemsize}"), k))
            indices += start
            found.append(indices)
    return np.concatenate(found)


def _keys_of_rows(vector: CompensatedGradient, start: int, stop: int) -> Keys:
    if stop - start <= BLOCK_NUMEL:
        return vector.keys(start, stop)
    # a row longer than a block
    return vector.bits_at(slice(start, stop)) & sign_cleared(vector.dtype)


def _nothing(dtype: torch.dtype, *, finite: bool) -> Selection:
    nothing = torch.zeros(0, dtype=torch.int64)
    return Selection(nothing, nothing.to(dtype), finite)


def _check_k(k: int, numel: int) -> None:
    if not 0 <= k <= numel:
        raise ValueError(f"k={k!r}: expected a number in [0, {numel}]")

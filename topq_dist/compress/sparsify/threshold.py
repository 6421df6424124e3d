"""The few elements of a vector that can be among its k largest, found by a threshold.

Sources: last step's threshold, used again, is Ok-Topk's (Li and Hoefler, "Near-Optimal Sparse
Allreduce", PPoPP 2022); the first one, from a sample, is that of Lin et al., "Deep Gradient
Compression" (ICLR 2018). Both are only where the search begins here: what is selected is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np

from topq_dist.compress.kernels import LANES, find_reaching
from topq_dist.compress.kernels.scratch import BLOCK_NUMEL, blocks, scratch, spans
from topq_dist.compress.kernels.threads import run_all
from topq_dist.compress.sparsify.magnitude import CompensatedGradient, UndoLog
from topq_dist.dtypes import FLOATS, Indices, Keys, sign_cleared

_SAMPLE_NUMEL = 32_768

K = TypeVar("K", int, Indices)


class Candidates(NamedTuple):
    """Where a vector's magnitudes reach a threshold (ascending), and the bits of its numbers there.

    `reached` says how many do; where it is over the limit that the search was given, it is a lower
    bound, and the other two are empty.
    """

    indices: Indices
    bits: Keys
    reached: int


def most_candidates(k: K) -> K:
    """Return how many candidates for k places are worth having; past it, a better threshold is."""
    return 4 * k + _SAMPLE_NUMEL


def find_candidates(
    vector: CompensatedGradient, threshold: int, limit: int, undo_log: UndoLog | None = None
) -> Candidates:
    """Return where the vector's keys reach `threshold`, if there are no more than `limit`.

    With `undo_log`, of the residual, that becomes the sum in the same pass. What is returned is
    valid until the calling thread's next search.
    """
    search = partial(_find_in_span, vector, threshold, limit, undo_log)
    slices = spans(vector.numel, BLOCK_NUMEL)
    if len(slices) == 1:
        return search(*slices[0])
    # a thread's scratch is another caller's before long
    parts = run_all([partial(_copied, search, *one) for one in slices])
    reached = sum(part.reached for part in parts)
    if reached > limit:
        return Candidates(parts[0].indices[:0], parts[0].bits[:0], reached)
    return Candidates(
        np.concatenate([part.indices for part in parts]),
        np.concatenate([part.bits for part in parts]),
        reached,
    )


def all_candidates(vector: CompensatedGradient) -> Candidates:
    """Return the whole vector."""
    bits = vector.bits_at(slice(0, vector.numel))
    return Candidates(np.arange(vector.numel, dtype=np.int64), bits, vector.numel)


def partitioned_candidates(vector: CompensatedGradient, k: int) -> Candidates:
    """Return exactly k, from a partition of the whole vector: slow, but whatever it holds."""
    keys = vector.bits_at(slice(0, vector.numel)) & sign_cleared(vector.dtype)
    kth = np.partition(keys, keys.size - k)[keys.size - k]
    above = (keys > kth).nonzero()[0]
    tied = (keys == kth).nonzero()[0][: k - above.size]
    indices = np.sort(np.concatenate([above, tied]))
    return Candidates(indices, vector.bits_at(indices), k)


def filled_with_zeros(vector: CompensatedGradient, found: Candidates, k: int) -> Candidates:
    """Return k candidates where `found`, fewer, are all that is not zero: zeros from the front."""
    free = np.ones(k, dtype=bool)
    free[found.indices[found.indices < k]] = False
    zeros = free.nonzero()[0][: k - found.indices.size]
    indices = np.sort(np.concatenate([found.indices, zeros]))
    return Candidates(indices, vector.bits_at(indices), k)


def sampled_threshold(vector: CompensatedGradient, k: int) -> int:
    """Return a key, at least 1, that somewhat more than k keys should reach: from a sample."""
    # an odd stride, or a power-of-two row length would show the sample one column only
    stride = max(1, vector.numel // _SAMPLE_NUMEL) | 1
    sample = vector.bits_at(slice(0, vector.numel, stride)) & sign_cleared(vector.dtype)
    expected = k / vector.numel * sample.size
    rank = int(expected + 4.0 * expected**0.5 + 4.0)
    if rank >= sample.size:
        return 1
    return max(1, int(np.partition(sample, sample.size - rank)[sample.size - rank]))


def _copied(search: Callable[[int, int], Candidates], start: int, stop: int) -> Candidates:
    found = search(start, stop)
    return Candidates(found.indices.copy(), found.bits.copy(), found.reached)


def _find_in_span(
    vector: CompensatedGradient,
    threshold: int,
    limit: int,
    undo_log: UndoLog | None,
    start: int,
    stop: int,
) -> Candidates:
    key_dtype = np.dtype(FLOATS[vector.dtype].key)
    low = np.dtype(f"i{key_dtype.itemsize}").type(threshold)
    # LANES more, or the kernel would stop before it has found one too many
    room = min(limit, stop - start) + 1 + LANES
    added = None if undo_log is None else undo_log.begin(start)
    found = 0
    for at, end in blocks(start, stop, vector.largest_slice):
        numbers, residual = vector.operands(at, end)
        indices, listed = scratch.listing(room, numbers.dtype)
        before = None if undo_log is None else undo_log.before[at:end]
        found = find_reaching(numbers, residual, low, at, indices, listed, found, before, added)
        if found > limit and undo_log is None:
            break
    indices, bits = scratch.listing(room, key_dtype)
    shown = found if found <= limit else 0
    return Candidates(indices[:shown], bits[:shown], found)

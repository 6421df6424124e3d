"""The few elements of a vector that can be among its k largest, found by a threshold."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from topq_dist.compress.bitmap import count_set_bits, set_bits
from topq_dist.compress.bits import Bytes
from topq_dist.compress.blocks import (
    BLOCK_NUMEL,
    KEY_DTYPES,
    STRETCH_NUMEL,
    CompensatedGradient,
    Indices,
    Keys,
    blocks,
    not_finite_allowed,
    scratch,
    sign_cleared,
    spans,
)
from topq_dist.compress.workers import run_all, thread_count

_SAMPLE_NUMEL = 32_768
# as many random reads as are worth another thread
_GATHER_NUMEL = 16_384


class Candidates(NamedTuple):
    """Where a vector's magnitudes reach a threshold (ascending), and the bits of its numbers there.

    `reached` says how many do; where it is over the limit that the search was given, it is a lower
    bound, and the other two are empty.
    """

    indices: Indices
    bits: Keys
    reached: int


def most_candidates(k: int) -> int:
    """Return how many candidates for k places are worth having; past it, a better threshold is."""
    return 4 * k + _SAMPLE_NUMEL


def find_candidates(vector: CompensatedGradient, threshold: int, limit: int) -> Candidates:
    """Return where the vector's keys reach `threshold`, if there are no more than `limit`."""
    # one thread gathers from each stretch while it is cached; several do long passes only, because
    # threads that take turns at short ones wait for Python's lock
    stretch_numel = STRETCH_NUMEL if thread_count() == 1 else max(1, vector.numel)
    indices, bits, reached = [np.zeros(0, np.int64)], [np.zeros(0, KEY_DTYPES[vector.dtype])], 0
    for start, stop in blocks(0, vector.numel, stretch_numel):
        bitmap = scratch.bitmap(stop - start)
        run_all(
            [
                partial(_mark, vector, threshold, bitmap, start, start + low, start + high)
                for low, high in spans(stop - start, BLOCK_NUMEL)
            ]
        )
        count = count_set_bits(bitmap)
        reached += count
        if reached > limit:
            return Candidates(indices[0], bits[0], reached)
        found = set_bits(bitmap, count)
        found += start
        indices.append(found)
        bits += run_all([partial(_gather, vector, found[at]) for at in _slices(count)])
    return Candidates(np.concatenate(indices), np.concatenate(bits), reached)


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


def _mark(
    vector: CompensatedGradient, threshold: int, bitmap: Bytes, origin: int, start: int, stop: int
) -> None:
    """Write to a bitmap that begins at `origin` which keys reach the threshold."""
    lowest = KEY_DTYPES[vector.dtype](threshold)
    with not_finite_allowed():
        for at, end in blocks(start, stop):
            reached = scratch.mask[: end - at]
            np.greater_equal(vector.keys(at, end), lowest, out=reached)
            packed = np.packbits(reached, bitorder="little")
            first_byte = (at - origin) // 8
            bitmap[first_byte : first_byte + packed.size] = packed


def _gather(vector: CompensatedGradient, indices: Indices) -> Keys:
    with not_finite_allowed():
        return vector.bits_at(indices)


def _slices(count: int) -> list[slice]:
    return [slice(low, high) for low, high in spans(count, _GATHER_NUMEL)]

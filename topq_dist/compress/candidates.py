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
    nothing = Candidates(np.zeros(0, np.int64), np.zeros(0, KEY_DTYPES[vector.dtype]), 0)
    found, reached = [nothing], 0
    # threads share the long passes only: those that take turns at short ones wait for Python's
    # lock. One thread alone gathers from a stretch while it is cached
    at_once = STRETCH_NUMEL if thread_count() == 1 else max(1, vector.numel)
    for begin, end in blocks(0, vector.numel, at_once):
        bitmap = _mark(vector, threshold, begin, end)
        for start, stop in blocks(begin, end, STRETCH_NUMEL):
            part = bitmap[(start - begin) // 8 : (stop - begin + 63) // 64 * 8]
            count = count_set_bits(part)
            reached += count
            if reached > limit:
                return nothing._replace(reached=reached)
            indices = set_bits(part, count)
            indices += start
            found.append(Candidates(indices, vector.bits_at(indices), count))
    return Candidates(
        np.concatenate([part.indices for part in found]),
        np.concatenate([part.bits for part in found]),
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


def _mark(vector: CompensatedGradient, threshold: int, start: int, stop: int) -> Bytes:
    """Return a bitmap, in kept scratch, of which keys of a stretch reach the threshold."""
    bitmap = scratch.bitmap(stop - start)
    lowest = KEY_DTYPES[vector.dtype](threshold)

    def mark(low: int, high: int) -> None:
        with not_finite_allowed():
            for at, end in blocks(start + low, start + high):
                reached = scratch.mask[: end - at]
                np.greater_equal(vector.keys(at, end), lowest, out=reached)
                packed = np.packbits(reached, bitorder="little")
                first_byte = (at - start) // 8
                bitmap[first_byte : first_byte + packed.size] = packed

    run_all([partial(mark, *span) for span in spans(stop - start, BLOCK_NUMEL)])
    return bitmap

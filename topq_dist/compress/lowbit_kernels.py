"""Blocks of low-bit values in compiled loops, anew with each segment and without padding.

Innermost loops begin at zero, in slices: only then is it known that no index counts from the end.

A block is up to `block_numel` values of one segment.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from topq_dist.compress.machine_code import compiled

# sums are added up in so many lanes, and these in pairs, as numpy does it
_LANES = 8
_SIGN = np.uint32(1 << 31)


@compiled
def magnitude_ranges(magnitudes: Any, ks: Any, block_numel: Any, low: Any, high: Any) -> None:
    """Write each block's smallest and largest magnitude.

    `magnitudes` is fp32 (k,), `ks` int64 (segments,), which add up to k; `low` and `high` are fp32
    (blocks,).
    """
    block = start = 0
    for segment in range(ks.size):
        end = start + ks[segment]
        while start < end:
            stop = min(start + block_numel, end)
            numbers = magnitudes[start:stop]
            smallest = largest = numbers[0]
            for at in range(numbers.size):
                smallest = min(smallest, numbers[at])
                largest = max(largest, numbers[at])
            low[block], high[block] = smallest, largest
            block += 1
            start = stop


@compiled
def two_means(magnitudes: Any, ks: Any, block: Any, below: Any, above: Any) -> None:
    """Write the means of each block's magnitudes up to and above their mean.

    `magnitudes` and `ks` are as in magnitude_ranges; `block` is scratch of fp64 (block_numel,), a
    multiple of 8; `below` and `above` are fp64 (blocks,), the same where all are alike.
    """
    lanes = np.empty(_LANES, np.float64)
    number = start = 0
    for segment in range(ks.size):
        end = start + ks[segment]
        while start < end:
            stop = min(start + block.size, end)
            filled = stop - start
            block[:filled] = magnitudes[start:stop]
            block[filled:] = 0.0
            total = _sum(block, lanes)
            mean = total / np.float64(filled)
            count_above = 0
            for at in range(block.size):
                is_above = block[at] > mean
                count_above += is_above
                block[at] = block[at] if is_above else 0.0
            sum_above = _sum(block, lanes)
            # never all of them: a mean of fp32 numbers in fp64 is not below the smallest
            below[number] = (total - sum_above) / np.float64(filled - count_above)
            above[number] = below[number]
            if count_above:
                above[number] = sum_above / np.float64(count_above)
            number += 1
            start = stop


@compiled
def nearest_levels(
    magnitudes: Any, ks: Any, block_numel: Any, base: Any, step: Any, top: Any, levels: Any
) -> None:
    """Write the level in [0, top] for which base + level * step is nearest to each magnitude.

    `magnitudes` and `ks` are as in magnitude_ranges; `base` and `step` are fp32 (blocks,), `top`
    fp32, `levels` uint8 (k,).
    """
    block = start = 0
    for segment in range(ks.size):
        end = start + ks[segment]
        while start < end:
            stop = min(start + block_numel, end)
            lowest, gap = base[block], step[block]
            numbers, nearest = magnitudes[start:stop], levels[start:stop]
            if gap == 0.0:
                for at in range(numbers.size):
                    nearest[at] = np.uint8(top) if numbers[at] > lowest else np.uint8(0)
            else:
                for at in range(numbers.size):
                    level = np.rint(np.divide(numbers[at] - lowest, gap))
                    nearest[at] = np.uint8(np.int32(min(max(level, np.float32(0.0)), top)))
            block += 1
            start = stop


@compiled
def values_of_levels(
    codes: Any, ks: Any, block_numel: Any, base: Any, step: Any, width: Any, values: Any, bits: Any
) -> None:
    """Write what codes of `width` bits stand for: base + level * step, with a sign.

    `codes` is uint8 (k,), the highest bit the sign; `ks`, `base` and `step` are as in
    nearest_levels; `values` is fp32 (k,), `bits` the same memory as uint32.
    """
    mask, shift = np.int32((1 << (width - 1)) - 1), np.uint32(32 - width)
    block = start = 0
    for segment in range(ks.size):
        end = start + ks[segment]
        while start < end:
            stop = min(start + block_numel, end)
            lowest, gap = base[block], step[block]
            here, numbers, words = codes[start:stop], values[start:stop], bits[start:stop]
            for at in range(numbers.size):
                # of 32 bits after each step: in Python's integers the loop would count in 64
                level = np.int32(np.int32(here[at]) & mask)
                numbers[at] = np.float32(level) * gap + lowest
            for at in range(words.size):
                words[at] |= np.uint32(np.uint32(here[at]) << shift) & _SIGN
            block += 1
            start = stop


@compiled
def _sum(numbers: Any, lanes: Any) -> Any:
    lanes[:] = 0.0
    for at in range(0, numbers.size, lanes.size):
        for lane in range(lanes.size):
            lanes[lane] += numbers[at + lane]
    low = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3])
    return low + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]))

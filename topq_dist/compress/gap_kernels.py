"""The compiled loops of index coding; see kernels.py for what holds of all of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from topq_dist.compress.machine_code import compiled, lowest_bit


@compiled
def gaps_between(indices: Any, numel: Any, gaps: Any) -> Any:
    """Write how many positions are skipped before each index; False unless they ascend in range."""
    previous = -1
    for at in range(indices.size):
        index = indices[at]
        if index <= previous or index >= numel:
            return False
        gaps[at] = index - previous - 1
        previous = index
    return True


@compiled
def sum_of_quotients(gaps: Any, bits: Any) -> Any:
    """Return the sum of gaps >> bits, which may be over an int32."""
    total = np.int64(0)
    for at in range(gaps.size):
        total += gaps[at] >> bits
    return total


@compiled
def write_gaps(gaps: Any, bits: Any, unary: Any, planes: Any, fields: Any) -> None:
    """Write gaps in Rice code: quotients in unary, whole low bytes, the rest in fields of bits % 8.

    All three outputs begin as zeros and have room; `planes` is (bits // 8, k).
    """
    at_bit = -1
    whole, width = bits // 8, bits % 8
    held, filled, at_byte = 0, 0, 0
    for at in range(gaps.size):
        gap = gaps[at]
        at_bit += (gap >> bits) + 1
        unary[at_bit >> 3] |= np.uint8(1 << (at_bit & 7))
        for plane in range(whole):
            planes[plane, at] = (gap >> (8 * plane)) & 255
        if width:
            held |= ((gap >> (8 * whole)) & ((1 << width) - 1)) << filled
            filled += width
            if filled >= 8:
                fields[at_byte] = held & 255
                at_byte += 1
                held >>= 8
                filled -= 8
    if filled:
        fields[at_byte] = held & 255


@compiled
def read_gaps(unary: Any, planes: Any, fields: Any, bits: Any, indices: Any) -> Any:
    """Undo write_gaps, into ascending indices; `unary` comes as uint64 words, bit 0 first.

    Returns (how many codes there are, the last one's bit); reads no more than indices.size.
    """
    whole, width = bits // 8, bits % 8
    held, filled, at_byte = 0, 0, 0
    found, last_bit, index = 0, -1, -1
    for at_word in range(unary.size):
        word = unary[at_word]
        while word != 0:
            if found == indices.size:
                return found + 1, last_bit
            at_bit = 64 * at_word + int(lowest_bit(word))
            word &= word - np.uint64(1)
            gap = (at_bit - last_bit - 1) << bits
            last_bit = at_bit
            for plane in range(whole):
                gap |= np.int64(planes[plane, found]) << (8 * plane)
            if width:
                if filled < width:
                    held |= np.int64(fields[at_byte]) << filled
                    at_byte += 1
                    filled += 8
                gap |= (held & ((1 << width) - 1)) << (8 * whole)
                held >>= width
                filled -= width
            index += gap + 1
            indices[found] = index
            found += 1
    return found, last_bit

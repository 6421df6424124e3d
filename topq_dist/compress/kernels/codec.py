"""The loops of the codec: gaps between indices, half precision, and blocks of low-bit values.

Innermost loops begin at zero, in slices: only then is it known that no index counts from the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from topq_dist.compress.kernels.jit import compiled, lowest_bit
from topq_dist.compress.native import binding

# sums are added up in so many lanes, and these in pairs, as numpy does it
_LANES = 8
_SINGLE_SIGN = np.uint32(1 << 31)
# all of 32 bits: with Python's integers the loops would count in 64, half as many at a time
_ONE, _SIGN_SHIFT, _HALF_SIGN, _INFINITY = (np.int32(n) for n in (1, 16, 0x8000, 0x7C00))
_MAGNITUDE, _MANTISSA, _LEADING = (np.int32(n) for n in (0x7FFFFFFF, 0x7FFFFF, 1 << 23))
# exponents of fp32 are biased by 127, those of fp16 by 15; fp32 has 13 more bits of mantissa
_REBIAS, _SHIFT, _ROUNDING = (np.int32(n) for n in ((127 - 15) << 23, 13, 0xFFF))
_EXPONENT_SHIFT, _LARGEST_SHIFT, _UNIT_EXPONENT = (np.int32(n) for n in (23, 25, 126))
_SMALLEST_NORMAL_HALF = np.int32(1 << 10)
_LARGEST = np.finfo(np.float32).max


@compiled
def gaps_between(indices: Any, numel: Any, gaps: Any) -> Any:
    """Write how many positions are skipped before each index; False unless they ascend in range.

    indices: int64 (k,). numel: int. gaps: int32 or int64 (k,), wide enough for numel.
    """
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
    """Return the sum of gaps >> bits, which may be over an int32.

    gaps: int32 or int64 (k,). bits: int.
    """
    total = np.int64(0)
    for at in range(gaps.size):
        total += gaps[at] >> bits
    return total


@compiled
def write_gaps(gaps: Any, bits: Any, unary: Any, planes: Any, fields: Any) -> None:
    """Write gaps in Rice code: quotients in unary, whole low bytes, the rest in fields of bits % 8.

    gaps: int32 or int64 (k,). bits: int. unary: uint8 (bytes of the quotients,), zeros at first.
    planes: uint8 (bits // 8, k). fields: uint8 (bytes of the fields,), zeros at first.
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
    """Undo write_gaps, into ascending indices.

    unary: uint64 (words,), bit 0 first. planes, fields, bits: as in write_gaps. indices: int64
    (k,). Returns (how many codes there are, the last one's bit); reads no more than k.
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


@compiled
def round_to_half(numbers: Any, scale: Any, scaled: Any, bits: Any, halves: Any) -> None:
    """halves = the bits of fp16(numbers * scale), ties to even; the products are below 65520.

    numbers: fp32 (k,). scale: fp32. scaled: fp32 (k,), scratch. bits: int32 (k,), the same memory.
    halves: uint16 (k,).
    """
    for at in range(numbers.size):
        scaled[at] = numbers[at] * scale
    for at in range(bits.size):
        sign = (bits[at] >> _SIGN_SHIFT) & _HALF_SIGN
        magnitude = bits[at] & _MAGNITUDE
        odd = (magnitude >> _SHIFT) & _ONE
        normal = (magnitude - _REBIAS + _ROUNDING + odd) >> _SHIFT
        # below the normal numbers the mantissa, its leading one written out, counts units of 2**-24
        mantissa = (magnitude & _MANTISSA) | _LEADING
        shift = _UNIT_EXPONENT - (magnitude >> _EXPONENT_SHIFT)
        shift = min(_LARGEST_SHIFT, shift)
        shift = max(_ONE, shift)
        odd = (mantissa >> shift) & _ONE
        tiny = (mantissa + (_ONE << (shift - _ONE)) - _ONE + odd) >> shift
        halves[at] = sign | (normal if magnitude >= _REBIAS + _LEADING else tiny)


@compiled
def widen_half(halves: Any, scale: Any, widened: Any, bits: Any) -> Any:
    """widened = fp32(halves) * scale; returns False where a number is not finite.

    halves: uint16 (k,). scale: fp32. widened: fp32 (k,). bits: int32 (k,), the same memory.
    """
    finite = True
    for at in range(halves.size):
        magnitude = np.int32(halves[at]) & (_HALF_SIGN - _ONE)
        finite &= magnitude < _INFINITY
        # numbers below the normal ones get a leading one that is taken off again
        leading = _LEADING if magnitude < _SMALLEST_NORMAL_HALF else np.int32(0)
        bits[at] = (magnitude << _SHIFT) + _REBIAS + leading
    for at in range(halves.size):
        half = np.int32(halves[at])
        leading = np.float32(2.0**-14) if half & _INFINITY == 0 else np.float32(0.0)
        number = (widened[at] - leading) * scale
        finite &= number <= _LARGEST
        widened[at] = -number if half & _HALF_SIGN else number
    return finite


@compiled
def magnitude_ranges(magnitudes: Any, ks: Any, block_numel: Any, low: Any, high: Any) -> None:
    """Write each block's smallest and largest magnitude.

    magnitudes: fp32 (k,). ks: int64 (segments,), which add up to k. block_numel: int, the most
    values of a block. low, high: fp32 (blocks,).
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

    magnitudes, ks: as in magnitude_ranges. block: fp64 (block_numel,), a multiple of 8, scratch.
    below, above: fp64 (blocks,), the same where all magnitudes are.
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

    magnitudes, ks, block_numel: as in magnitude_ranges. base, step: fp32 (blocks,). top: fp32.
    levels: uint8 (k,).
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

    codes: uint8 (k,), the highest of width (int) bits the sign. ks, block_numel, base, step: as in
    nearest_levels. values: fp32 (k,). bits: uint32 (k,), the same memory.
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
                words[at] |= np.uint32(np.uint32(here[at]) << shift) & _SINGLE_SIGN
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


# where the library is there; else numba's stay
globals().update(
    binding.kernels(
        "gaps_between", "read_gaps", "round_to_half", "sum_of_quotients", "widen_half", "write_gaps"
    )
)

"""Values rounded to a format and read again: the bits of codec/values.py and half_lowbit.c.

A block is 128 values of one segment, fewer at its end; the formats of few bits have their scales
for each.

    value_blocks   int64 (blocks, 3): first value, how many, the segment
    values         patterns of the selected values, (k,)
    limits         fp64 (segments,), where values are clipped
    peak           int64 (1,), zero at first: the largest pattern without sign, of fp32, or fp64
    codes          (k,): sign and level in a byte, or the pattern that is sent
    scales         int32 (blocks,): base and step as bf16
    decoded        (k,): fp32, or fp64 for "fp64"
    rest           patterns of the values' dtype, (k,): what of them is not sent
"""

import triton
import triton.language as tl

from topq_dist.compress.gpu.kernels.bounds import sum_of_lanes
from topq_dist.compress.gpu.kernels.vectors import FP64, widened

# places in VALUE_FORMATS
V_FP32 = tl.constexpr(0)
V_FP16 = tl.constexpr(1)
V_BF16 = tl.constexpr(2)
V_INT8 = tl.constexpr(3)
V_INT4 = tl.constexpr(4)
V_INT2 = tl.constexpr(5)
V_FP64 = tl.constexpr(6)

VALUES = tl.constexpr(128)
LARGEST_FP32 = tl.constexpr(3.4028234663852886e38)
LARGEST_BF16 = tl.constexpr(3.3895313892515355e38)
LARGEST_FP16 = tl.constexpr(32752.0 * 2.0**113)
# added and taken off again, it rounds to whole numbers: its last bit is worth 1
WHOLE = tl.constexpr(12582912.0)


@triton.jit
def wide_at(values, limits, segment, at, mask, KIND: tl.constexpr, BOUNDED: tl.constexpr):
    """Some values in fp32 or fp64, and what is sent of them before it is rounded."""
    bits = tl.load(values + at, mask=mask, other=0)
    if KIND == FP64:
        wide = bits.to(tl.float64, bitcast=True)
    else:
        wide = widened(bits, KIND)
    sent = wide
    if BOUNDED:
        limit = tl.load(limits + segment, mask=mask, other=0.0).to(wide.dtype)
        excess = wide - tl.maximum(tl.minimum(wide, limit), -limit)
        # one of sent and excess must give way for their sum to be the value
        sent = wide - excess
    return wide, sent


@triton.jit
def clipped(number, LARGEST: tl.constexpr):
    """A number, or the largest there is."""
    return tl.maximum(tl.minimum(number, LARGEST), -LARGEST)


@triton.jit
def fp16_exponent(peak, KIND: tl.constexpr):
    """The power of two that fp16 values are multiplied by: of the largest pattern without sign."""
    if KIND == FP64:
        magnitude = tl.minimum(peak.to(tl.float64, bitcast=True), LARGEST_FP16)
    else:
        magnitude = peak.to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)
        magnitude = tl.minimum(magnitude, LARGEST_FP16)
    # in fp64 what is small in fp32 is normal, and below that it is as small as can be
    exponent = ((magnitude.to(tl.int64, bitcast=True) >> 52) & 0x7FF).to(tl.int32) - 1022
    return tl.where(peak == 0, 0, tl.maximum(exponent - 15, -126))


@triton.jit
def power_of_two(exponent):
    """Two to a power in [-126, 127], in fp32."""
    return ((exponent + 127) << 23).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def find_peak(
    values, value_blocks, count, limits, peak, KIND: tl.constexpr, BOUNDED: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Find the largest magnitude of what is sent."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    known = block < count
    start = tl.load(value_blocks + 3 * block, mask=known, other=0)
    size = tl.load(value_blocks + 3 * block + 1, mask=known, other=0)
    segment = tl.load(value_blocks + 3 * block + 2, mask=known, other=0)
    lane = tl.arange(0, VALUES)
    mask = lane[None, :] < size[:, None]
    at = start[:, None] + lane[None, :]
    _, sent = wide_at(values, limits, segment[:, None], at, mask, KIND, BOUNDED)
    if KIND == FP64:
        keys = sent.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        keys = (sent.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int64)
    keys = tl.where(mask, keys, 0)
    tl.atomic_max(peak, tl.max(tl.max(keys, 1), 0))


@triton.jit
def quantize(
    values,
    value_blocks,
    count,
    limits,
    peak,
    codes,
    scales,
    decoded,
    rest,
    KIND: tl.constexpr,
    BOUNDED: tl.constexpr,
    FORMAT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Round BLOCKS blocks of values: write codes, scales, what they decode to, and the rest."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    known = block < count
    start = tl.load(value_blocks + 3 * block, mask=known, other=0)
    size = tl.load(value_blocks + 3 * block + 1, mask=known, other=0)
    segment = tl.load(value_blocks + 3 * block + 2, mask=known, other=0)
    lane = tl.arange(0, VALUES)
    mask = lane[None, :] < size[:, None]
    at = start[:, None] + lane[None, :]
    wide, sent = wide_at(values, limits, segment[:, None], at, mask, KIND, BOUNDED)
    if FORMAT == V_FP64:
        number = sent.to(tl.float64)
        code = number.to(tl.int64, bitcast=True)
    elif FORMAT == V_FP32:
        number = clipped(sent, LARGEST_FP32).to(tl.float32)
        code = number.to(tl.int32, bitcast=True)
    elif FORMAT == V_BF16:
        single = clipped(sent, LARGEST_BF16).to(tl.float32).to(tl.int32, bitcast=True)
        rounded = (single + 0x7FFF + ((single >> 16) & 1)) >> 16
        number = (rounded << 16).to(tl.float32, bitcast=True)
        code = rounded
    elif FORMAT == V_FP16:
        exponent = fp16_exponent(tl.load(peak), KIND)
        single = clipped(sent, LARGEST_FP16).to(tl.float32)
        half = (single * power_of_two(-exponent)).to(tl.float16)
        number = half.to(tl.float32) * power_of_two(exponent)
        code = half.to(tl.int16, bitcast=True)
    else:
        BITS: tl.constexpr = 8 if FORMAT == V_INT8 else (4 if FORMAT == V_INT4 else 2)
        single = clipped(sent, LARGEST_FP32).to(tl.float32)
        magnitude = tl.minimum(tl.abs(single), 2.0**127)
        TOP: tl.constexpr = (1 << (BITS - 1)) - 1
        if BITS == 2:
            base, step = two_levels(values, limits, segment, start, size, KIND, BOUNDED, BLOCKS)
        else:
            smallest = tl.min(tl.where(mask, magnitude, float("inf")), 1)
            largest = tl.max(tl.where(mask, magnitude, 0.0), 1)
            base = cut_off(tl.where(known, smallest, 0.0), 0)
            step = cut_off(tl.div_rn(largest - base, tl.full([BLOCKS], TOP, tl.float32)), 0xFFFF)
        lowest = base[:, None]
        gap = step[:, None] + tl.zeros([BLOCKS, VALUES], tl.float32)
        level = tl.div_rn(magnitude - lowest, tl.where(gap == 0.0, 1.0, gap))
        level = (tl.minimum(tl.maximum(level, 0.0), TOP) + WHOLE) - WHOLE
        level = tl.where(gap == 0.0, tl.where(magnitude > lowest, TOP, 0.0), level)
        number = level * gap + lowest
        sign = single.to(tl.int32, bitcast=True) & -0x80000000
        number = (number.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        code = level.to(tl.int32) | tl.where(sign == 0, 0, 1 << (BITS - 1))
        both = ((base.to(tl.int32, bitcast=True) >> 16) & 0xFFFF) | (
            step.to(tl.int32, bitcast=True) & -0x10000
        )
        tl.store(scales + block, both, mask=known)
    tl.store(codes + at, code, mask=mask)
    tl.store(decoded + at, number, mask=mask)
    if HAS_RESIDUAL:
        if FORMAT == V_FP64:
            left = (wide.to(tl.float64) - number).to(wide.dtype)
        else:
            left = wide - number.to(wide.dtype)
        if KIND == FP64:
            tl.store(rest + at, left.to(tl.int64, bitcast=True), mask=mask)
        else:
            tl.store(rest + at, left.to(tl.int32, bitcast=True), mask=mask)


@triton.jit
def cut_off(number, UP: tl.constexpr):
    """A number without the bits that bf16 has no room for; the next one above for UP of 0xFFFF."""
    return ((number.to(tl.int32, bitcast=True) + UP) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def two_levels(
    values, limits, segment, start, size, KIND: tl.constexpr, BOUNDED: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """The scales of 2 bits: the means of the magnitudes up to and above their mean."""
    sums = tl.zeros([BLOCKS, 8], tl.float64)
    for row in range(16):
        sums += single_at(values, limits, segment, start, size, row, KIND, BOUNDED)
    total = sum_of_lanes(sums, BLOCKS)
    mean = total / tl.maximum(size, 1).to(tl.float64)
    larger = tl.zeros([BLOCKS, 8], tl.float64)
    counts = tl.zeros([BLOCKS, 8], tl.int32)
    for row in range(16):
        magnitude = single_at(values, limits, segment, start, size, row, KIND, BOUNDED)
        is_above = magnitude > mean[:, None]
        larger += tl.where(is_above, magnitude, 0.0)
        counts += is_above.to(tl.int32)
    count_above = tl.sum(counts, 1).to(tl.float64)
    sum_above = sum_of_lanes(larger, BLOCKS)
    # never all of them: a mean of fp32 numbers in fp64 is not below the smallest
    below = (total - sum_above) / tl.maximum(size.to(tl.float64) - count_above, 1.0)
    above = tl.where(count_above > 0.0, sum_above / tl.maximum(count_above, 1.0), below)
    base = cut_off(below.to(tl.float32), 0)
    step = cut_off((above - base.to(tl.float64)).to(tl.float32), 0)
    return base, step


@triton.jit
def single_at(values, limits, segment, start, size, row, KIND: tl.constexpr, BOUNDED: tl.constexpr):
    """The magnitudes of eight values of each block, in fp64, zero where there are none."""
    at = row * 8 + tl.arange(0, 8)[None, :]
    mask = at < size[:, None]
    _, sent = wide_at(values, limits, segment[:, None], start[:, None] + at, mask, KIND, BOUNDED)
    single = clipped(sent, LARGEST_FP32).to(tl.float32)
    return tl.where(mask, tl.minimum(tl.abs(single), 2.0**127), 0.0).to(tl.float64)

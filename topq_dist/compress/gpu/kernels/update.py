"""The end of a step: residuals and averages, if the step counts on every rank.

report  int64 (ranks,), padded to RANKS with zeros: all zero where it counts
"""

import triton
import triton.language as tl

from topq_dist.compress.gpu.kernels.vectors import FP16, FP64, sum_bits


@triton.jit
def step_counts(report, ranks, RANKS: tl.constexpr):
    """Whether no rank has reported anything."""
    rank = tl.arange(0, RANKS)
    return tl.max(tl.load(report + rank, mask=rank < ranks, other=0), 0) == 0


@triton.jit
def take_up(
    gradient, residual, total, report, ranks, numel, not_a_number, KIND: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_TOTAL: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """residual += gradient and gradient = 0; or, where the step does not count, gradient = NaN.

    gradient and residual: patterns. total: fp32, where the average is made if HAS_TOTAL.
    not_a_number: its pattern.
    """
    counts = step_counts(report, ranks, RANKS)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    if HAS_RESIDUAL:
        counted = at < tl.where(counts, numel, 0)
        bits = sum_bits(gradient, residual, at, counted, KIND, HAS_RESIDUAL)
        tl.store(residual + at, bits, mask=counted)
    filled = tl.where(counts, 0, not_a_number).to(gradient.dtype.element_ty)
    tl.store(gradient + at, tl.zeros([BLOCK], gradient.dtype.element_ty) + filled, mask=mask)
    if HAS_TOTAL:
        tl.store(total + at, tl.zeros([BLOCK], tl.float32), mask=mask)


@triton.jit
def keep_rest(
    residual, indices, rest, plan, k, report, ranks, RANKS: tl.constexpr, BLOCK: tl.constexpr
):
    """residual[indices] = rest, where the frame has been sent; both are patterns."""
    counts = step_counts(report, ranks, RANKS)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < tl.where(counts, tl.minimum(tl.load(plan), k), 0)
    index = tl.load(indices + at, mask=mask, other=0)
    tl.store(residual + index, tl.load(rest + at, mask=mask, other=0), mask=mask)


@triton.jit
def add_frame(
    total, indices, values, head, divisor, numel, report, ranks, KIND: tl.constexpr,
    RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """total[indices] += values / divisor, of one rank: no index comes twice.

    total: fp32 or fp64, by KIND. values: fp32 or fp64. head: of the rank's frame.
    """
    counts = step_counts(report, ranks, RANKS)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < tl.where(counts, tl.load(head), 0)
    index = tl.load(indices + at, mask=mask, other=0)
    # whatever a report has missed, nothing is written beside the vector
    mask = mask & (index >= 0) & (index < numel)
    value = tl.load(values + at, mask=mask, other=0.0)
    # an argument of one is compiled in, and has no dtype
    if value.dtype == tl.float64:
        share = value / (tl.zeros([BLOCK], tl.float64) + divisor)
    else:
        share = tl.div_rn(value, tl.zeros([BLOCK], tl.float32) + divisor)
    if KIND == FP64:
        share = share.to(tl.float64)
    else:
        share = share.to(tl.float32)
    was = tl.load(total + index, mask=mask, other=0.0)
    tl.store(total + index, was + share, mask=mask)


@triton.jit
def round_total(
    gradient, total, report, ranks, numel, KIND: tl.constexpr, ALONE: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """gradient = total, where the step counts; gradient: patterns of fp16 or bf16.

    ALONE: the frames are one, which the CPU rounds before it adds it to zero: none is -0.
    """
    counts = step_counts(report, ranks, RANKS)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < tl.where(counts, numel, 0)
    number = tl.load(total + at, mask=mask, other=0.0)
    if KIND == FP16:
        rounded = number.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        bits = number.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    if ALONE:
        rounded = tl.where(rounded == -32768, 0, rounded)
    tl.store(gradient + at, rounded, mask=mask)

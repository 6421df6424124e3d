"""Each segment's largest value that is sent: a multiple of the mean magnitude, as on the CPU.

The sum is that of half_lowbit.inc.h to the bit: 8 lanes of up to 128 magnitudes each in fp64, these
in pairs, and halves of more; the first value apart. The halves are leaves of a binary tree whose
node n is the sum of 2 n and 2 n + 1; places without a leaf hold zero, which changes no sum.

    leaves   int64 (leaves, 4): first value, how many, place in `nodes`, the segment
    trees    int64 (segments, 5): where its tree begins in `nodes`, its levels, its first value, k,
             and whether it is clipped
    nodes    fp64, zero where no leaf is
    limits   fp64 (segments,)
"""

import triton
import triton.language as tl

from topq_dist.compress.gpu.kernels.vectors import FP64


@triton.jit
def magnitudes_at(values, at, mask, KIND: tl.constexpr):
    """The magnitudes of some values, of fp32 or fp64 patterns, in fp64."""
    bits = tl.load(values + at, mask=mask, other=0)
    if KIND == FP64:
        magnitude = tl.abs(bits.to(tl.float64, bitcast=True))
    else:
        magnitude = tl.abs(bits.to(tl.float32, bitcast=True)).to(tl.float64)
    return magnitude


@triton.jit
def sum_leaves(values, leaves, count, nodes, KIND: tl.constexpr, LEAVES: tl.constexpr):
    """Write the sum of each leaf."""
    leaf = tl.program_id(0) * LEAVES + tl.arange(0, LEAVES)
    known = leaf < count
    start = tl.load(leaves + 4 * leaf, mask=known, other=0)
    size = tl.load(leaves + 4 * leaf + 1, mask=known, other=0)
    in_lanes = size - size % 8
    lane = tl.arange(0, 8)
    sums = tl.zeros([LEAVES, 8], tl.float64)
    for row in range(16):
        at = row * 8 + lane[None, :]
        sums += magnitudes_at(values, start[:, None] + at, at < in_lanes[:, None], KIND)
    total = sum_of_lanes(sums, LEAVES)
    for rest in range(7):
        at = in_lanes + rest
        total += magnitudes_at(values, start + at, at < size, KIND)
    tl.store(nodes + tl.load(leaves + 4 * leaf + 2, mask=known, other=0), total, mask=known)


@triton.jit
def sum_of_lanes(lanes, ROWS: tl.constexpr):
    """The sum of eight lanes, in pairs."""
    one, other = tl.split(tl.reshape(lanes, [ROWS, 4, 2]))
    one, other = tl.split(tl.reshape(one + other, [ROWS, 2, 2]))
    one, other = tl.split(tl.reshape(one + other, [ROWS, 1, 2]))
    return tl.reshape(one + other, [ROWS])


@triton.jit
def sum_trees(values, trees, nodes, limits, bound, KIND: tl.constexpr, CHUNK: tl.constexpr):
    """Add up each segment's tree, one program for each, and write its limit."""
    tree = trees + 5 * tl.program_id(0)
    root = nodes + tl.load(tree)
    levels = tl.load(tree + 1)
    first = tl.load(tree + 2)
    k = tl.load(tree + 3)
    for level in range(0, levels):
        width = tl.full([], 1, tl.int64) << (levels - 1 - level)
        for offset in range(0, width, CHUNK):
            at = width + offset + tl.arange(0, CHUNK)
            mask = at < 2 * width
            sums = tl.load(root + 2 * at, mask=mask, other=0.0)
            sums += tl.load(root + 2 * at + 1, mask=mask, other=0.0)
            tl.store(root + at, sums, mask=mask)
        # the next level reads what other threads of this program have written
        tl.debug_barrier()
    some = k > 0
    # of one value there is no tree
    rest = tl.load(root + 1, mask=k > 1, other=0.0)
    total = magnitudes_at(values, first, some, KIND) + rest
    share = bound / tl.maximum(k, 1).to(tl.float64)
    clipped = tl.load(tree + 4) > 0
    tl.store(limits + tl.program_id(0), tl.where(clipped, total * share, float("inf")), mask=some)

"""Rice coding of the gaps between ascending indices (Rice and Plaunt, 1971; Golomb, 1966).

A gap g is the number of unselected positions before an index. Its quotient g >> b goes in unary
(zeros, then a one) into one bit stream, its b low bits into another: whole bytes first, one plane a
byte, then the remaining b % 8 bits packed. The streams lie apart rather than one code after the
other, so that whole-array code can read them too; the size is the same.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from topq_dist.compress.codec.bits import Bytes, packed_bytes, padding_is_zero
from topq_dist.compress.kernels import read_gaps, sums_of_quotients, write_gaps

Integers = npt.NDArray[np.signedinteger]
# of how many b the costs are found in one go: from the mean gap's logarithm the cheapest is near
_TRIED = 4


def largest_bits(numel: int, k: int) -> int:
    """Return the largest b that can be the cheapest for k gaps in `numel` positions.

    From b - 1 to b pays only while the mean gap is at least 2**(b - 1).
    """
    return (numel // k).bit_length()


def low_bytes(k: int, bits: int) -> int:
    """Return the bytes that the low bits of k gaps take."""
    return k * (bits // 8) + packed_bytes(k, bits % 8)


def bound_bytes(numel: int, k: int) -> int:
    """Return the most bytes that the Rice code of any k of `numel` positions takes."""
    least = min(
        (k + ((numel - k) >> bits) + 7) // 8 + low_bytes(k, bits)
        for bits in range(largest_bits(numel, k) + 1)
    )
    # best_bits goes by bits, and then each of the two streams is filled up to whole bytes
    return least + 1


def best_bits(gaps: Integers, numel: int) -> tuple[int, int]:
    """Return the cheapest b for these gaps and the bytes it takes, by exact cost.

    The cost is convex in b, so the descent from the mean gap's logarithm ends at the minimum.
    """
    k, limit = gaps.size, largest_bits(numel, gaps.size)
    lowest = limit + 1
    cost, best, total = math.inf, limit, 0
    while lowest > 0:
        above, lowest = lowest, max(0, lowest - _TRIED)
        sums = np.empty(above - lowest, np.int64)
        sums_of_quotients(gaps, lowest, sums)
        # of several that are cheapest the largest, but for the limit
        for bits, quotients in reversed(list(enumerate(sums.tolist(), lowest))):
            other = k * bits + quotients
            if other < cost or (other == cost and best == limit):
                cost, best, total = other, bits, quotients
        if best > lowest:
            break
    return best, (total + k + 7) // 8 + low_bytes(k, best)


def encode_gaps(gaps: Integers, bits: int, *, code_bytes: int | None = None) -> Bytes:
    """Return the code of `gaps` (at least one, none negative) with `bits` low bits.

    code_bytes: its length, where best_bits has told.
    """
    k, low = gaps.size, low_bytes(gaps.size, bits)
    if code_bytes is None:
        total = np.empty(1, np.int64)
        sums_of_quotients(gaps, bits, total)
        code_bytes = (int(total[0]) + k + 7) // 8 + low
    code = np.zeros(code_bytes, dtype=np.uint8)
    planes_at, fields_at = code_bytes - low, code_bytes - low + bits // 8 * k
    planes = code[planes_at:fields_at].reshape(bits // 8, k)
    write_gaps(gaps, bits, code[:planes_at], planes, code[fields_at:])
    return code


def decode_indices(code: Bytes, numel: int, k: int, bits: int) -> npt.NDArray[np.int64]:
    """Return the k ascending indices below `numel` that `code` holds.

    Raises ValueError for anything that encode_gaps would not have written. Allocates in proportion
    to k and to the code's own length only.
    """
    if bits > largest_bits(numel, k):
        raise ValueError(f"Rice parameter {bits} is too large for {k} of {numel}")
    unary_bytes = code.size - low_bytes(k, bits)
    if not (k + 7) // 8 <= unary_bytes <= (k + ((numel - k) >> bits) + 7) // 8:
        raise ValueError(f"{code.size} index bytes do not fit {k} of {numel} in Rice code {bits}")
    whole, rest = divmod(bits, 8)
    unary, low = code[:unary_bytes], code[unary_bytes:]
    planes, fields = low[: whole * k], low[whole * k :]
    if rest and not padding_is_zero(fields, k * rest):
        raise ValueError("low bits end in bits that are not zero")
    indices = np.empty(k, dtype=np.int64)
    count, last_bit = read_gaps(unary, planes.reshape(whole, k), fields, bits, indices)
    if count != k:
        raise ValueError(f"{'more' if count > k else count} unary codes, expected {k}")
    if last_bit // 8 + 1 != unary_bytes:
        raise ValueError("zero bytes after the last unary code")
    if int(indices[-1]) >= numel:
        raise ValueError(f"index {int(indices[-1])} is not below {numel}")
    return indices

"""Rice coding of the gaps between ascending indices (Rice and Plaunt, 1971; Golomb, 1966).

A gap g is the number of unselected positions before an index. Its quotient g >> b goes in unary
(zeros, then a one) into one bit stream, its b low bits into another: whole bytes first, one plane a
byte, then the remaining b % 8 bits packed. The streams lie apart rather than one code after the
other, so that whole-array code can read them too; the size is the same.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from topq_dist.compress.codec.bits import Bytes, packed_bytes, padding_is_zero
from topq_dist.compress.kernels import read_gaps, sum_of_quotients, write_gaps

Integers = npt.NDArray[np.signedinteger]


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
    k = gaps.size

    def cost_bits(bits: int) -> int:
        return k * (bits + 1) + int(sum_of_quotients(gaps, bits))

    limit = largest_bits(numel, k)
    bits = max(0, limit - 1)
    cost = cost_bits(bits)
    for step in (-1, 1):
        while 0 <= bits + step <= limit and (other := cost_bits(bits + step)) < cost:
            bits, cost = bits + step, other
    unary_bits = cost - k * bits
    return bits, (unary_bits + 7) // 8 + low_bytes(k, bits)


def encode_gaps(gaps: Integers, bits: int) -> Bytes:
    """Return the code of `gaps` (at least one, none negative) with `bits` low bits."""
    k = gaps.size
    unary_bits = int(sum_of_quotients(gaps, bits)) + k
    unary = np.zeros((unary_bits + 7) // 8, dtype=np.uint8)
    planes = np.empty((bits // 8, k), dtype=np.uint8)
    fields = np.zeros(packed_bytes(k, bits % 8), dtype=np.uint8)
    write_gaps(gaps, bits, unary, planes, fields)
    return np.concatenate([unary, planes.reshape(-1), fields])


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

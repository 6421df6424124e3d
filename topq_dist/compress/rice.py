"""Rice coding of the gaps between ascending indices (Rice and Plaunt, 1971; Golomb, 1966).

A gap g is the number of unselected positions before an index. Its quotient g >> b goes in unary
(zeros, then a one) into one bit stream, its b low bits into another: whole bytes first, one plane a
byte, then the remaining b % 8 bits packed. Streams apart rather than one code after the other is
what lets whole arrays be coded at once; the size is the same.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from topq_dist.compress.bits import (
    Bytes,
    pack_fields,
    packed_bytes,
    padding_is_zero,
    unpack_fields,
)

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
        return k * (bits + 1) + int((gaps >> bits).sum(dtype=np.int64))

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
    # int64: as many ones before as gaps, as many zeros as the quotients add up to
    ones = np.cumsum(gaps >> bits, dtype=np.int64)
    ones += np.arange(k)
    unary = np.zeros(int(ones[-1]) + 1, dtype=np.uint8)
    unary[ones] = 1
    streams = [np.packbits(unary, bitorder="little")]
    planes = gaps.astype(gaps.dtype.newbyteorder("<"), copy=False).view(np.uint8).reshape(k, -1)
    whole, rest = divmod(bits, 8)
    streams += [planes[:, plane] for plane in range(whole)]
    if rest:
        streams.append(pack_fields(planes[:, whole] & np.uint8((1 << rest) - 1), rest))
    return np.concatenate(streams)


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
    ones = np.unpackbits(code[:unary_bytes], bitorder="little").view(bool).nonzero()[0]
    if ones.size != k:
        raise ValueError(f"{ones.size} unary codes, expected {k}")
    if (int(ones[-1]) + 8) // 8 != unary_bytes:
        raise ValueError("zero bytes after the last unary code")

    low = np.ones(k, dtype=np.int64)
    whole, rest = divmod(bits, 8)
    for plane in range(whole):
        start = unary_bytes + plane * k
        low += code[start : start + k].astype(np.int64) << (8 * plane)
    if rest:
        stream = code[unary_bytes + whole * k :]
        if not padding_is_zero(stream, k * rest):
            raise ValueError("low bits end in bits that are not zero")
        low += unpack_fields(stream, k, rest).astype(np.int64) << (8 * whole)
    ones -= np.arange(k)
    ones <<= bits
    ones += np.cumsum(low)
    ones -= 1
    if int(ones[-1]) >= numel:
        raise ValueError(f"index {int(ones[-1])} is not below {numel}")
    return ones

"""CRC-32 of frames, many bytes at a time: what each lane reads is shifted to where it belongs.

The checksum is linear but for its first and last step: that of a stream is the exclusive or of
those of its slices, each multiplied by x to the power of the bits behind it. Sources: zlib's
crc32_combine (Adler); Koopman, "32-Bit Cyclic Redundancy Codes" (DSN 2002).

    rows     uint8: a frame every `stride` bytes
    lengths  int64 (frames,): bytes of each, header included
    tables   int32: 256 for a byte's checksum, then 4 x 256 x 32 for the shift by so many bytes, a
             table for each digit of their number in base 256; each has 32 columns, one for a bit
    sums     int32 (frames,), zero at first: the checksum
"""

import triton
import triton.language as tl

BYTES = tl.constexpr(32)
CRC_AT = tl.constexpr(28)


@triton.jit
def checksum(
    rows, stride, lengths, lengths_stride, tables, sums, sums_stride, LOG_LANES: tl.constexpr,
    DIGITS: tl.constexpr,
):  # fmt: skip
    """Add slices of a frame, a lane each, to its checksum; the bytes that hold it are left out."""
    LANES: tl.constexpr = 1 << LOG_LANES
    frame = tl.program_id(1).to(tl.int64)
    stream = tl.load(lengths + frame * lengths_stride) - 4
    first = tl.program_id(0).to(tl.int64) * LANES * BYTES
    if first < stream:
        lane = first + tl.arange(0, LANES).to(tl.int64) * BYTES
        crc = tl.where(lane == 0, -1, 0).to(tl.int32)
        for step in range(BYTES):
            at = lane + step
            inside = at < stream
            byte = tl.load(
                rows + frame * stride + tl.where(at < CRC_AT, at, at + 4), mask=inside, other=0
            )
            place = (crc ^ byte.to(tl.int32)) & 255
            taken = tl.load(tables + place) ^ ((crc >> 8) & 0xFFFFFF)
            crc = tl.where(inside, taken, crc)
        behind = tl.maximum(stream - lane - BYTES, 0)
        for digit in range(DIGITS):
            value = (behind >> (8 * digit)) & 255
            columns = tables + 256 + (digit * 256 + value) * 32
            shifted = tl.zeros([LANES], tl.int32)
            for bit in range(32):
                shifted = shifted ^ (tl.load(columns + bit) & -((crc >> bit) & 1))
            crc = shifted
        crc = tl.where(lane < stream, crc, 0)
        total = xor_of(crc, LOG_LANES)
        # the last step
        total = total ^ tl.where(first == 0, -1, 0)
        tl.atomic_xor(sums + frame * sums_stride + tl.arange(0, 1), total)


@triton.jit
def xor_of(lanes, LOG_LANES: tl.constexpr):
    """The exclusive or of all lanes, a vector of one, in pairs: the interpreter is fast at that."""
    for level in tl.static_range(LOG_LANES):
        one, other = tl.split(tl.reshape(lanes, [1 << (LOG_LANES - 1 - level), 2]))
        lanes = one ^ other
    return tl.reshape(lanes, [1])

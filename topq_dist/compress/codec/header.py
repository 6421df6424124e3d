"""The header of a frame: 32 bytes, and up to 12 more as its format asks; little-endian.

| offset | bytes | field |
|---|---|---|
| 0 | 4 | magic "TOPQ" |
| 4 | 1 | version, 1 |
| 5 | 1 | flags: bit 0, the gradient was not finite (then k = 0 and no payload); bit 1, see below |
| 6 | 1 | value format, the position in VALUE_FORMATS |
| 7 | 1 | index coding: 0 all, 1 raw, 2 bitmap, 3 Rice-coded gaps, 4 the same in tiles (tiled.py) |
| 8 | 1 | Rice parameter b, else 0 |
| 9 | 1 | signed power of two that fp16 values are multiplied by, else 0 |
| 10 | 2 | zero |
| 12 | 4 | index payload's length in bytes; the value payload's follows from k and the format |
| 16 | 8 | numel, elements of the dense vector |
| 24 | 4 | k, how many of them are here |
| 28 | 4 | CRC-32 of bytes 0 to 27 and of everything after byte 31 |
| 32 | 4 | with bit 1: bytes of the list of segments, which lies before the value payload |
| 36 | 4 | with bit 1: blocks of values |
| 32 or 40 | 4 | with an entropy-coded value format: the value payload's length in bytes |

Bit 1: the values, of a format that has blocks, lie in two or more segments (segment_list.py), and
their blocks begin anew with each. Without it there is one segment, and neither of its two fields.
Unused fields are zero, and reading insists on it.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

from topq_dist.compress.codec.bits import Bytes
from topq_dist.compress.codec.indices import IndexCoding
from topq_dist.compress.codec.segment_list import LONGEST_BYTES
from topq_dist.compress.codec.values import (
    BLOCK_NUMELS,
    CODED,
    VALUE_FORMATS,
    exponent_is_valid,
    payload_bytes,
)

HEADER_BYTES = 32
# more of a header where the values lie in segments
SEGMENTS_HEADER_BYTES = 8
# and where their payload's length is told
VALUES_HEADER_BYTES = 4
LARGEST_NUMEL = 2**48
LARGEST_FIELD = 2**32 - 1
_LAYOUT = struct.Struct("<4sBBBBBbHIQII")
_CRC_OFFSET = 28
_MAGIC = b"TOPQ"
_VERSION = 1
_NON_FINITE = 1
_SEGMENTED = 2
_SEGMENTS = struct.Struct("<II")
_VALUES = struct.Struct("<I")
_CODINGS = frozenset(IndexCoding)


class FrameError(ValueError):
    """The bytes are not a frame that this version can read, or not of the expected size."""


class FrameHeader(NamedTuple):
    """What a frame says about itself; the fields agree with each other, no more is known yet.

    segment_bytes: length of the list of segments, 0 where there is one segment or none.
    blocks: how many blocks of values they come to; None where there is no list.
    coded_bytes: length of the value payload where the format is entropy-coded, else None.
    """

    finite: bool
    value_format: str
    index_coding: IndexCoding
    rice_bits: int
    exponent: int
    index_bytes: int
    numel: int
    k: int
    segment_bytes: int = 0
    blocks: int | None = None
    coded_bytes: int | None = None

    @property
    def header_bytes(self) -> int:
        """Length of the header, where the index payload begins."""
        return (
            HEADER_BYTES
            + (SEGMENTS_HEADER_BYTES if self.segment_bytes else 0)
            + (0 if self.coded_bytes is None else VALUES_HEADER_BYTES)
        )

    @property
    def value_bytes(self) -> int:
        """Length of the value payload."""
        if self.coded_bytes is not None:
            return self.coded_bytes
        return payload_bytes(self.k, self.value_format, blocks=self.blocks)

    @property
    def frame_bytes(self) -> int:
        """Length of the whole frame."""
        return self.header_bytes + self.index_bytes + self.segment_bytes + self.value_bytes


def write_header(header: FrameHeader, frame: Bytes) -> None:
    """Write the header of `frame`, whose payloads are there already, checksum included."""
    flags = 0 if header.finite else _NON_FINITE
    if header.segment_bytes:
        flags |= _SEGMENTED
        _SEGMENTS.pack_into(frame.data, HEADER_BYTES, header.segment_bytes, header.blocks)
    if header.coded_bytes is not None:
        _VALUES.pack_into(frame.data, header.header_bytes - _VALUES.size, header.coded_bytes)
    fields = (
        _MAGIC,
        _VERSION,
        flags,
        VALUE_FORMATS.index(header.value_format),
        header.index_coding,
        header.rice_bits,
        header.exponent,
        0,
        header.index_bytes,
        header.numel,
        header.k,
    )
    _LAYOUT.pack_into(frame.data, 0, *fields, 0)
    _LAYOUT.pack_into(frame.data, 0, *fields, _crc(frame))


def checksum_fits(frame: Bytes) -> bool:
    """Return whether the frame, of its full length, is the one that its checksum was made of."""
    return int.from_bytes(frame[_CRC_OFFSET:HEADER_BYTES].tobytes(), "little") == _crc(frame)


def read_header(raw: Bytes) -> FrameHeader:
    """Read the header that `raw` begins with; raise FrameError where there is none."""
    if raw.size < HEADER_BYTES:
        raise FrameError(f"{raw.size} bytes: expected a header of {HEADER_BYTES}")
    (
        magic,
        version,
        flags,
        value_format,
        coding,
        rice_bits,
        exponent,
        reserved,
        index_bytes,
        numel,
        k,
        _,
    ) = _LAYOUT.unpack_from(raw[:HEADER_BYTES].tobytes())
    if magic != _MAGIC:
        raise FrameError(f"begins with {magic!r}: expected {_MAGIC!r}")
    if version != _VERSION:
        raise FrameError(f"frame version {version}: this library reads version {_VERSION}")
    if flags not in (0, _NON_FINITE, _SEGMENTED) or reserved:
        raise FrameError(f"flags {flags} and reserved field {reserved}: not known in version 1")
    if value_format >= len(VALUE_FORMATS):
        raise FrameError(f"value format {value_format}: expected one below {len(VALUE_FORMATS)}")
    if coding not in _CODINGS:
        raise FrameError(f"index coding {coding}: expected one below {len(IndexCoding)}")
    if numel > LARGEST_NUMEL or k > numel:
        raise FrameError(f"{k} of {numel} elements: expected k <= numel <= {LARGEST_NUMEL}")
    if flags == _NON_FINITE and (k or index_bytes):
        raise FrameError(f"a non-finite frame with {k} values and {index_bytes} index bytes")
    name = VALUE_FORMATS[value_format]
    if not exponent_is_valid(name, exponent):
        raise FrameError(f"exponent {exponent} with value format {name}")
    segment_bytes, blocks = (0, None) if flags != _SEGMENTED else _read_segments(raw, name, k)
    offset = HEADER_BYTES + (SEGMENTS_HEADER_BYTES if segment_bytes else 0)
    coded_bytes = _read_coded(raw, offset, name, k, blocks) if name in CODED else None
    return FrameHeader(
        finite=flags != _NON_FINITE,
        value_format=name,
        index_coding=IndexCoding(coding),
        rice_bits=rice_bits,
        exponent=exponent,
        index_bytes=index_bytes,
        numel=numel,
        k=k,
        segment_bytes=segment_bytes,
        blocks=blocks,
        coded_bytes=coded_bytes,
    )


def _read_coded(raw: Bytes, offset: int, value_format: str, k: int, blocks: int | None) -> int:
    """Return the length of the value payload, which the header has at `offset`."""
    end = offset + VALUES_HEADER_BYTES
    if raw.size < end:
        raise FrameError(f"{raw.size} bytes: expected a header of {end}")
    (coded_bytes,) = _VALUES.unpack_from(raw[offset:end].tobytes())
    most = payload_bytes(k, value_format, blocks=blocks)
    if coded_bytes > most:
        raise FrameError(f"{coded_bytes} bytes of {k} values: expected at most {most}")
    return int(coded_bytes)


def _read_segments(raw: Bytes, value_format: str, k: int) -> tuple[int, int]:
    """Return the length of the list of segments, and how many blocks they come to."""
    if value_format not in BLOCK_NUMELS:
        raise FrameError(f"flags {_SEGMENTED} with value format {value_format}: it has no segments")
    end = HEADER_BYTES + SEGMENTS_HEADER_BYTES
    if raw.size < end:
        raise FrameError(f"{raw.size} bytes: expected a header of {end}")
    segment_bytes, blocks = _SEGMENTS.unpack_from(raw[HEADER_BYTES:end].tobytes())
    # a byte and a value at least for each of two segments
    if not 2 <= segment_bytes <= LONGEST_BYTES * k:
        raise FrameError(f"{segment_bytes} bytes of segments with {k} values")
    if not max(2, -(-k // BLOCK_NUMELS[value_format])) <= blocks <= k:
        raise FrameError(f"{blocks} blocks of segments with {k} values")
    return segment_bytes, blocks


def _crc(frame: Bytes) -> int:
    return zlib.crc32(frame[HEADER_BYTES:].data, zlib.crc32(frame[:_CRC_OFFSET].data))

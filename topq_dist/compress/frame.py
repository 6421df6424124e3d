"""The frame: (numel, indices, values) as one versioned, checksummed run of bytes.

Little-endian throughout; a header of 32 bytes, then the index payload, then the value payload.

| offset | bytes | field |
|---|---|---|
| 0 | 4 | magic "TOPQ" |
| 4 | 1 | version, 1 |
| 5 | 1 | flags: bit 0, the gradient was not finite (then k = 0 and no payload) |
| 6 | 1 | value format, the position in VALUE_FORMATS |
| 7 | 1 | index coding: 0 all, 1 raw, 2 bitmap, 3 Rice-coded gaps |
| 8 | 1 | Rice parameter b, else 0 |
| 9 | 1 | signed power of two that fp16 values are multiplied by, else 0 |
| 10 | 2 | zero |
| 12 | 4 | index payload's length in bytes; the value payload's follows from k and the format |
| 16 | 8 | numel, elements of the dense vector |
| 24 | 4 | k, how many of them are here |
| 28 | 4 | CRC-32 of bytes 0 to 27 and of everything after byte 31 |

There is one frame for one content but for the encoder's choice of coding, Rice parameter and scale:
unused bits and fields are zero and decoding insists on it.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from topq_dist.compress.bits import Bytes
from topq_dist.compress.index_coding import (
    IndexCoding,
    bound_bytes,
    decode_indices,
    encode_indices,
)
from topq_dist.compress.values import (
    VALUE_FORMATS,
    check_value_format,
    decode_values,
    encode_values,
    exponent_is_valid,
    payload_bytes,
)

HEADER_BYTES = 32
_HEADER = struct.Struct("<4sBBBBBbHIQII")
_MAGIC = b"TOPQ"
_VERSION = 1
_NON_FINITE = 1
_LARGEST_COUNT = 2**32 - 1
_LARGEST_NUMEL = 2**48

Buffer = Tensor | bytes | bytearray | memoryview


class FrameError(ValueError):
    """The bytes are not a frame that this version can read, or not of the expected size."""


@dataclass(frozen=True, kw_only=True)
class FrameHeader:
    """What a frame says about itself in its first 32 bytes; nothing here is checked by a CRC."""

    finite: bool
    value_format: str
    index_coding: IndexCoding
    rice_bits: int
    exponent: int
    index_bytes: int
    numel: int
    k: int
    crc: int

    @property
    def frame_bytes(self) -> int:
        """Length of the whole frame."""
        return HEADER_BYTES + self.index_bytes + payload_bytes(self.k, self.value_format)


class EncodedFrame(NamedTuple):
    """A frame (1-D uint8 CPU tensor), and the values (fp32, or fp64) that it decodes to."""

    frame: Tensor
    decoded: Tensor


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A decoded frame: `indices` int64 ascending, `values` fp32 or fp64, both (k,) on the CPU.

    Where `finite` is False the sender's gradient had overflowed, and there are no values.
    """

    numel: int
    indices: Tensor
    values: Tensor
    finite: bool

    def add_to(self, out: Tensor) -> None:
        """Add the frame to `out`, (numel,) of any float dtype; a non-finite one makes it NaN."""
        if tuple(out.shape) != (self.numel,):
            raise ValueError(f"out has shape {tuple(out.shape)}: expected ({self.numel},)")
        if not self.finite:
            out.fill_(torch.nan)
        elif out.device.type == "cpu" and out.dtype == self.values.dtype:
            # the indices are distinct, so a gather, an add and a scatter in numpy do it, at half
            # of index_add_'s time
            dense = out.detach().numpy()
            at = self.indices.numpy()
            dense[at] = dense.take(at, mode="clip") + self.values.numpy()
        else:
            indices = self.indices.to(out.device)
            out.index_add_(0, indices, self.values.to(device=out.device, dtype=out.dtype))


def encode_frame(
    numel: int, indices: Tensor, values: Tensor, value_format: str = "fp32"
) -> EncodedFrame:
    """Write `values` at strictly ascending `indices` of a vector of `numel` elements as a frame.

    `indices` is an integer tensor and `values` a float tensor, both of shape (k,). Raises
    ValueError for indices out of order or range, values that are not finite (see
    encode_non_finite_frame), an unknown value format, or sizes past the header's fields
    (k below 2**32, numel at most 2**48).
    """
    check_value_format(value_format)
    if indices.dim() != 1 or indices.shape != values.shape:
        raise ValueError(
            f"indices has shape {tuple(indices.shape)} and values {tuple(values.shape)}: "
            "expected one dimension, the same for both"
        )
    if indices.dtype.is_floating_point or not values.dtype.is_floating_point:
        raise ValueError(
            f"indices has dtype {indices.dtype} and values {values.dtype}: "
            "expected an integer and a float dtype"
        )
    k = values.numel()
    _check_counts(numel, k)
    encoded = encode_values(values.detach().cpu(), value_format)
    index = encode_indices(indices.cpu().numpy().astype(np.int64, copy=False), numel)
    frame = _assemble(
        FrameHeader(
            finite=True,
            value_format=value_format,
            index_coding=index.coding,
            rice_bits=index.rice_bits,
            exponent=encoded.exponent,
            index_bytes=index.payload.size,
            numel=numel,
            k=k,
            crc=0,
        ),
        index.payload,
        encoded.payload,
    )
    return EncodedFrame(frame, encoded.decoded)


def encode_non_finite_frame(numel: int, value_format: str = "fp32") -> Tensor:
    """Return the frame that tells receivers that this gradient held NaN or infinity."""
    check_value_format(value_format)
    _check_counts(numel, 0)
    nothing = np.zeros(0, dtype=np.uint8)
    header = FrameHeader(
        finite=False,
        value_format=value_format,
        index_coding=IndexCoding.ALL if numel == 0 else IndexCoding.RAW,
        rice_bits=0,
        exponent=0,
        index_bytes=0,
        numel=numel,
        k=0,
        crc=0,
    )
    return _assemble(header, nothing, nothing)


def max_frame_bytes(numel: int, k: int, value_format: str) -> int:
    """Return the length that no frame of k values at any indices below `numel` exceeds."""
    check_value_format(value_format)
    if not 0 <= k <= numel:
        raise ValueError(f"k={k!r}: expected a number in [0, numel={numel}]")
    return HEADER_BYTES + bound_bytes(numel, k) + payload_bytes(k, value_format)


def peek_header(buffer: Buffer) -> FrameHeader:
    """Read the header of the frame that `buffer` begins with, unverified but for its own fields.

    Raises FrameError where the first 32 bytes are not a header.
    """
    return _read_header(_as_bytes(buffer))


def decode_frame(buffer: Buffer, *, numel: int, padded: bool = False) -> Frame:
    """Read the frame in `buffer`, which must be of a vector of `numel` elements.

    `buffer` is a 1-D uint8 tensor or bytes; with `padded` it may go on after the frame's end (a
    slot of a collective), else its length must be the frame's. Allocates in proportion to `numel`
    at most, and to no size that the bytes alone declare.

    Raises FrameError for anything that encode_frame did not write: never returns an index out of
    range, indices out of order, or a value that is not finite.
    """
    raw = _as_bytes(buffer)
    header = _read_header(raw)
    if header.numel != numel:
        raise FrameError(f"frame of {header.numel} elements: expected {numel}")
    if raw.size < header.frame_bytes or (raw.size > header.frame_bytes and not padded):
        raise FrameError(f"{raw.size} bytes: expected a frame of {header.frame_bytes}")
    raw = raw[: header.frame_bytes]
    if _crc(raw) != header.crc:
        raise FrameError("checksum does not match: the frame was damaged on its way")
    index_end = HEADER_BYTES + header.index_bytes
    try:
        indices = decode_indices(
            raw[HEADER_BYTES:index_end],
            header.index_coding,
            header.rice_bits,
            numel=numel,
            k=header.k,
        )
        values = decode_values(raw[index_end:], header.k, header.value_format, header.exponent)
    except ValueError as error:
        raise FrameError(str(error)) from error
    return Frame(
        numel=numel, indices=torch.from_numpy(indices), values=values, finite=header.finite
    )


def _as_bytes(buffer: Buffer) -> Bytes:
    if isinstance(buffer, Tensor):
        if buffer.dtype != torch.uint8 or buffer.dim() != 1:
            raise FrameError(
                f"buffer is a tensor of {buffer.dtype} with {buffer.dim()} dimensions: "
                "expected one dimension of uint8"
            )
        return buffer.detach().cpu().numpy()
    if not isinstance(buffer, bytes | bytearray | memoryview):
        raise FrameError(f"buffer is a {type(buffer).__name__}: expected a uint8 tensor or bytes")
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise FrameError("buffer is a memoryview with gaps: expected a contiguous one")
    return np.frombuffer(view, dtype=np.uint8)


def _read_header(raw: Bytes) -> FrameHeader:
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
        crc,
    ) = _HEADER.unpack_from(raw[:HEADER_BYTES].tobytes())
    if magic != _MAGIC:
        raise FrameError(f"begins with {magic!r}: expected {_MAGIC!r}")
    if version != _VERSION:
        raise FrameError(f"frame version {version}: this library reads version {_VERSION}")
    if flags not in (0, _NON_FINITE) or reserved:
        raise FrameError(f"flags {flags} and reserved field {reserved}: not known in version 1")
    if value_format >= len(VALUE_FORMATS):
        raise FrameError(f"value format {value_format}: expected one below {len(VALUE_FORMATS)}")
    if coding not in set(IndexCoding):
        raise FrameError(f"index coding {coding}: expected one below {len(IndexCoding)}")
    if numel > _LARGEST_NUMEL or k > numel:
        raise FrameError(f"{k} of {numel} elements: expected k <= numel <= {_LARGEST_NUMEL}")
    if flags == _NON_FINITE and (k or index_bytes):
        raise FrameError(f"a non-finite frame with {k} values and {index_bytes} index bytes")
    name = VALUE_FORMATS[value_format]
    if not exponent_is_valid(name, exponent):
        raise FrameError(f"exponent {exponent} with value format {name}")
    return FrameHeader(
        finite=flags == 0,
        value_format=name,
        index_coding=IndexCoding(coding),
        rice_bits=rice_bits,
        exponent=exponent,
        index_bytes=index_bytes,
        numel=numel,
        k=k,
        crc=crc,
    )


def _assemble(header: FrameHeader, index_payload: Bytes, value_payload: Bytes) -> Tensor:
    frame = np.empty(header.frame_bytes, dtype=np.uint8)
    index_end = HEADER_BYTES + index_payload.size
    frame[HEADER_BYTES:index_end] = index_payload
    frame[index_end:] = value_payload
    fields = (
        _MAGIC,
        _VERSION,
        0 if header.finite else _NON_FINITE,
        VALUE_FORMATS.index(header.value_format),
        header.index_coding,
        header.rice_bits,
        header.exponent,
        0,
        header.index_bytes,
        header.numel,
        header.k,
    )
    _HEADER.pack_into(frame.data, 0, *fields, 0)
    _HEADER.pack_into(frame.data, 0, *fields, _crc(frame))
    return torch.from_numpy(frame)


def _crc(frame: Bytes) -> int:
    return zlib.crc32(frame[HEADER_BYTES:].data, zlib.crc32(frame[:28].data))


def _check_counts(numel: int, k: int) -> None:
    if not 0 <= numel <= _LARGEST_NUMEL:
        raise ValueError(f"numel={numel!r}: expected a number in [0, {_LARGEST_NUMEL}]")
    if k > min(numel, _LARGEST_COUNT):
        raise ValueError(f"{k} indices: expected at most {min(numel, _LARGEST_COUNT)}")

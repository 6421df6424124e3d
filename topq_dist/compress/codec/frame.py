"""The frame: (numel, indices, values) as one versioned, checksummed run of bytes.

A header (header.py has its table), then the index payload, the list of segments where there
are several, then the value payload. There is one frame for one content but for the encoder's choice
of coding, Rice parameter and scale: unused bits are zero, and decoding insists on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from topq_dist.compress.codec.bits import Bytes
from topq_dist.compress.codec.header import (
    HEADER_BYTES,
    LARGEST_FIELD,
    LARGEST_NUMEL,
    SEGMENTS_HEADER_BYTES,
    VALUES_HEADER_BYTES,
    FrameError,
    FrameHeader,
    checksum_fits,
    read_header,
    write_header,
)
from topq_dist.compress.codec.indices import (
    IndexCoding,
    bound_bytes,
    decode_indices,
    encode_indices,
)
from topq_dist.compress.codec.lowbit import Counts, block_count
from topq_dist.compress.codec.segment_list import decode_ks, encode_ks
from topq_dist.compress.codec.values import (
    BLOCK_NUMELS,
    CODED,
    Quantized,
    check_value_format,
    decode_values,
    payload_bytes,
)
from topq_dist.compress.kernels import scatter_add

__all__ = [
    "HEADER_BYTES",
    "Buffer",
    "Frame",
    "FrameError",
    "FrameHeader",
    "decode_frame",
    "decode_with_header",
    "encode_frame",
    "encode_non_finite_frame",
    "max_frame_bytes",
    "peek_header",
]

Buffer = Tensor | bytes | bytearray | memoryview


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
            if not scatter_add(out.detach().numpy(), self.indices.numpy(), self.values.numpy()):
                raise IndexError(f"an index of the frame is not in [0, {self.numel})")
        else:
            indices = self.indices.to(out.device)
            out.index_add_(0, indices, self.values.to(device=out.device, dtype=out.dtype))


def encode_frame(
    numel: int, indices: Tensor, quantized: Quantized, *, in_tiles: bool = False
) -> Tensor:
    """Return the frame of quantized values at strictly ascending `indices` below `numel`.

    `indices` is an integer tensor of shape (k,); the frame is 1-D uint8 on the CPU. in_tiles: the
    indices are coded for many threads to read at once, as a GPU codes them. Raises ValueError for
    indices out of order or range, or as many as there are no values, or sizes past the header's
    fields (k below 2**32, numel at most 2**48).
    """
    k = quantized.decoded.numel()
    if indices.dim() != 1 or indices.shape != quantized.decoded.shape:
        raise ValueError(
            f"indices has shape {tuple(indices.shape)} and values "
            f"{tuple(quantized.decoded.shape)}: expected one dimension, the same for both"
        )
    if indices.dtype.is_floating_point:
        raise ValueError(f"indices has dtype {indices.dtype}: expected an integer dtype")
    _check_counts(numel, k)
    places = indices.cpu().numpy().astype(np.int64, copy=False)
    index = encode_indices(places, numel, in_tiles=in_tiles)
    if index.payload.size > LARGEST_FIELD:
        raise ValueError(f"{index.payload.size} index bytes: expected at most {LARGEST_FIELD}")
    ks = quantized.segment_ks
    listed = np.zeros(0, np.uint8) if ks is None else encode_ks(ks)
    if listed.size > LARGEST_FIELD:
        raise ValueError(f"{listed.size} bytes of segments: expected at most {LARGEST_FIELD}")
    coded = quantized.value_format in CODED
    if coded and quantized.payload.size > LARGEST_FIELD:
        raise ValueError(
            f"{quantized.payload.size} bytes of values: expected at most {LARGEST_FIELD}"
        )
    header = FrameHeader(
        finite=True,
        value_format=quantized.value_format,
        index_coding=index.coding,
        rice_bits=index.rice_bits,
        exponent=quantized.exponent,
        index_bytes=index.payload.size,
        numel=numel,
        k=k,
        segment_bytes=listed.size,
        blocks=None if ks is None else block_count(ks, BLOCK_NUMELS[quantized.value_format]),
        coded_bytes=quantized.payload.size if coded else None,
    )
    return _assemble(header, index.payload, listed, quantized.payload)


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
        coded_bytes=0 if value_format in CODED else None,
    )
    return _assemble(header, nothing)


def max_frame_bytes(numel: int, k: int, value_format: str, *, segments: int = 1) -> int:
    """Return the length that no frame of k values at any indices below `numel` exceeds.

    segments: how many the vector has, at most. Frames with their indices in tiles may be longer:
    `codec/tiled.py` has the bound of these.
    """
    check_value_format(value_format)
    if not 0 <= k <= numel:
        raise ValueError(f"k={k!r}: expected a number in [0, numel={numel}]")
    length = HEADER_BYTES + bound_bytes(numel, k)
    length += VALUES_HEADER_BYTES if value_format in CODED else 0
    several = min(segments, k)
    if several < 2 or value_format not in BLOCK_NUMELS:
        return length + payload_bytes(k, value_format)
    # no number is longer than k's own
    listed = several * encode_ks(np.array([k])).size
    blocks = -(-k // BLOCK_NUMELS[value_format]) + several - 1
    return length + SEGMENTS_HEADER_BYTES + listed + payload_bytes(k, value_format, blocks=blocks)


def peek_header(buffer: Buffer) -> FrameHeader:
    """Read the header of the frame that `buffer` begins with, unverified but for its own fields.

    Raises FrameError where the first 32 bytes are not a header.
    """
    return read_header(_as_bytes(buffer))


def decode_frame(
    buffer: Buffer, *, numel: int, padded: bool = False, in_place: bool = False
) -> Frame:
    """Read the frame in `buffer`, which must be of a vector of `numel` elements.

    `buffer` is a 1-D uint8 tensor or bytes; with `padded` it may go on after the frame's end (a
    slot of a collective), else its length must be the frame's. With `in_place` the frame may keep
    a view of `buffer`, which nobody else is to write into then. Allocates in proportion to `numel`
    at most, and to no size that the bytes alone declare.

    Raises FrameError for anything that encode_frame did not write: never returns an index out of
    range, indices out of order, or a value that is not finite.
    """
    return decode_with_header(buffer, numel=numel, padded=padded, in_place=in_place)[0]


def decode_with_header(
    buffer: Buffer, *, numel: int, padded: bool = False, in_place: bool = False
) -> tuple[Frame, FrameHeader]:
    """Return what decode_frame does, and what the frame says about itself."""
    raw = _as_bytes(buffer)
    header = read_header(raw)
    frame_bytes = header.frame_bytes
    if header.numel != numel:
        raise FrameError(f"frame of {header.numel} elements: expected {numel}")
    if raw.size < frame_bytes or (raw.size > frame_bytes and not padded):
        raise FrameError(f"{raw.size} bytes: expected a frame of {frame_bytes}")
    raw = raw[:frame_bytes]
    if not checksum_fits(raw):
        raise FrameError("checksum does not match: the frame was damaged on its way")
    index_end = header.header_bytes + header.index_bytes
    segments_end = index_end + header.segment_bytes
    try:
        indices = decode_indices(
            raw[header.header_bytes : index_end],
            header.index_coding,
            header.rice_bits,
            numel=numel,
            k=header.k,
        )
        values = decode_values(
            raw[segments_end:],
            header.k,
            header.value_format,
            header.exponent,
            segment_ks=_read_ks(raw[index_end:segments_end], header),
            in_place=in_place,
        )
    except ValueError as error:
        raise FrameError(str(error)) from error
    return Frame(
        numel=numel, indices=torch.from_numpy(indices), values=values, finite=header.finite
    ), header


def _as_bytes(buffer: Buffer) -> Bytes:
    if isinstance(buffer, Tensor):
        if buffer.dtype != torch.uint8 or buffer.dim() != 1:
            raise FrameError(
                f"buffer is a tensor of {buffer.dtype} with {buffer.dim()} dimensions: "
                "expected one dimension of uint8"
            )
        return buffer.numpy(force=True)
    if not isinstance(buffer, bytes | bytearray | memoryview):
        raise FrameError(f"buffer is a {type(buffer).__name__}: expected a uint8 tensor or bytes")
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise FrameError("buffer is a memoryview with gaps: expected a contiguous one")
    return np.frombuffer(view, dtype=np.uint8)


def _read_ks(listed: Bytes, header: FrameHeader) -> Counts | None:
    if header.blocks is None:
        return None
    ks = decode_ks(listed, header.k)
    blocks = block_count(ks, BLOCK_NUMELS[header.value_format])
    if blocks != header.blocks:
        raise ValueError(f"segments of {blocks} blocks: expected {header.blocks}")
    return ks


def _assemble(header: FrameHeader, *payloads: Bytes) -> Tensor:
    frame = np.empty(header.frame_bytes, dtype=np.uint8)
    if payloads:
        np.concatenate(payloads, out=frame[header.header_bytes :])
    write_header(header, frame)
    return torch.from_numpy(frame)


def _check_counts(numel: int, k: int) -> None:
    if not 0 <= numel <= LARGEST_NUMEL:
        raise ValueError(f"numel={numel!r}: expected a number in [0, {LARGEST_NUMEL}]")
    if k > min(numel, LARGEST_FIELD):
        raise ValueError(f"{k} indices: expected at most {min(numel, LARGEST_FIELD)}")

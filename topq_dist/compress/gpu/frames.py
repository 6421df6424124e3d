"""Frames of selected values in slots, made and read on a device; see kernels/frames.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from topq_dist.compress.codec.values import decoded_dtype
from topq_dist.compress.gpu.bounds import BoundTable
from topq_dist.compress.gpu.checksum import tables_on
from topq_dist.compress.gpu.kernels import bounds, checksum, frames, indices, values
from topq_dist.compress.gpu.memory import Scratch
from topq_dist.compress.gpu.select import KINDS, DeviceSelection
from topq_dist.compress.gpu.shape import FORMATS, FrameShape
from topq_dist.dtypes import FLOATS, key_of

# bytes of a slot before its frame, and what its length is a multiple of
HEAD_BYTES = 32
_SLOT_ALIGN_BYTES = 64
_HEAD_NUMBERS = 8
_LANES, _BLOCKS, _LEAVES = 256, 4, 16
# bytes of a frame that one program sums up
_SUMMED_BYTES = 32 * 128


class Written(NamedTuple):
    """What is left of a frame's values when it is in its slot.

    rest: (k,) patterns of the residual's dtype, of selected values less what a receiver sees; None
    without a residual. plan: int64 (4,), see kernels/frames.py.
    """

    rest: Tensor | None
    plan: Tensor


class Received(NamedTuple):
    """Frames of several ranks: int64 and fp32 or fp64 (ranks, k), and what each holds of them."""

    indices: Tensor
    values: Tensor
    heads: Tensor


def slot_bytes(shape: FrameShape, frame_bytes: int | None = None) -> int:
    """Return the length of a slot for frames of a shape: any of them, or of up to so many bytes."""
    room = shape.most_bytes if frame_bytes is None else max(HEAD_BYTES, frame_bytes)
    return -(-(HEAD_BYTES + room) // _SLOT_ALIGN_BYTES) * _SLOT_ALIGN_BYTES


def write_frame(
    selection: DeviceSelection,
    shape: FrameShape,
    bound: tuple[BoundTable, float] | None,
    slot: Tensor,
    scratch: Scratch,
    *,
    has_residual: bool,
    settings_digest: int,
    coherence: Tensor,
) -> Written:
    """Write the frame of a selection into a slot, uint8 of a multiple of 64 bytes.

    It holds no values where the vector was not finite, which it says, or where they have no room.
    bound: the table of the segments and TopKCompressor's bound. coherence: fp64 (2,).
    """
    device, dtype = slot.device, selection.values.dtype
    signed, kind, form = FLOATS[dtype].signed, KINDS[dtype], FORMATS[shape.value_format]
    bits = selection.values.view(signed)
    plan = torch.empty(4, dtype=torch.int64, device=device)
    rest = torch.empty(shape.k, dtype=signed, device=device) if has_residual else None
    decoded = scratch.take(shape.k, decoded_dtype(shape.value_format))
    code_dtype = FLOATS[decoded.dtype].signed
    if shape.value_format in ("fp16", "bf16"):
        code_dtype = torch.int16
    elif shape.value_format.startswith("int"):
        code_dtype = torch.uint8
    codes, scales = scratch.take(shape.k, code_dtype), scratch.take(shape.blocks, torch.int32)
    peak, tile_bits = scratch.zeros(1), scratch.take(shape.tiles + 1, torch.int64)
    slot.zero_()
    limits = plan if bound is None else bound[0].limits
    exact = {"enable_fp_fusion": False}
    if shape.k:
        if bound is not None:
            _find_limits(bits, bound, kind)
        blocks = (-(-shape.blocks // _BLOCKS),)
        clip = {"KIND": kind, "BOUNDED": bound is not None, "BLOCKS": _BLOCKS, **exact}
        if shape.value_format == "fp16":
            values.find_peak[blocks](bits, shape.value_blocks, shape.blocks, limits, peak, **clip)
        values.quantize[blocks](
            bits, shape.value_blocks, shape.blocks, limits, peak, codes, scales, decoded,
            bits if rest is None else rest, FORMAT=form, HAS_RESIDUAL=has_residual, **clip,
        )  # fmt: skip
    if shape.tiles:
        indices.count_tile_bits[(shape.tiles,)](
            selection.indices, shape.k, tile_bits, RICE=shape.rice_bits, **exact
        )
    row = slot.view(torch.int32)
    digest = settings_digest - (1 << 32) if settings_digest >= 1 << 31 else settings_digest
    frames.plan_frame[(1,)](
        tile_bits, shape.tiles, selection.highest, peak, plan, row, digest,
        coherence.view(torch.int32), shape.numel, shape.k, shape.directory_bytes, shape.low_bytes,
        shape.listed.numel(), shape.value_bytes, shape.blocks, slot.numel() - HEAD_BYTES,
        INFINITE=key_of(float("inf"), dtype), KIND=kind, FORMAT=form, RICE=shape.rice_bits,
        HEADER=shape.header_bytes, CHUNK=256, **exact,
    )  # fmt: skip
    frame = slot[HEAD_BYTES:]
    if shape.tiles:
        indices.write_tiles[(shape.tiles,)](
            selection.indices, shape.k, tile_bits, plan, frame.view(torch.int32),
            RICE=shape.rice_bits, WIDE=shape.entry_words, HEADER=shape.header_bytes, **exact,
        )  # fmt: skip
    following = shape.low_bytes + shape.listed.numel() + shape.value_bytes
    if shape.k:
        frames.write_payload[(-(-following // _LANES),)](
            selection.indices, shape.k, shape.listed, codes, scales, plan, frame,
            shape.header_bytes + shape.directory_bytes, shape.low_bytes, shape.listed.numel(),
            shape.value_bytes, shape.blocks, RICE=shape.rice_bits, FORMAT=form, LANES=_LANES,
            **exact,
        )  # fmt: skip
    # into the header itself, whose checksum leaves its own place out
    _sum_up(frame, 1, plan[2:], 4, row[HEAD_BYTES // 4 + 7 :], 1)
    return Written(rest, plan)


def check_frames(slots: Tensor, shape: FrameShape, report: Tensor) -> Tensor:
    """Read the heads of each rank's slot, uint8 (ranks, bytes), and check the frames' checksums.

    Returns what they say, int64 (ranks, 8). What is wrong with a slot, or not finite, is added to
    `report`, int64 (ranks,): see kernels/frames.py.
    """
    ranks, stride = slots.shape
    known = torch.zeros(ranks * (_HEAD_NUMBERS + 1), dtype=torch.int64, device=slots.device)
    heads, sums = known[: ranks * _HEAD_NUMBERS], known[ranks * _HEAD_NUMBERS :].view(torch.int32)
    frames.read_heads[(ranks,)](
        slots.view(torch.int32), stride // 4, heads, report, shape.numel, shape.k,
        shape.directory_bytes, shape.low_bytes, shape.most_unary_bytes, shape.listed.numel(),
        shape.value_bytes, shape.blocks, stride - HEAD_BYTES, FORMAT=FORMATS[shape.value_format],
        RICE=shape.rice_bits, HEADER=shape.header_bytes, enable_fp_fusion=False,
    )  # fmt: skip
    _sum_up(slots.view(-1)[HEAD_BYTES:], ranks, heads[3:], stride, sums, 2)
    frames.check_frames[(ranks,)](heads, sums, 2, report, enable_fp_fusion=False)
    return heads.view(ranks, -1)


def read_frames(
    slots: Tensor, shape: FrameShape, heads: Tensor, report: Tensor, scratch: Scratch
) -> Received:
    """Read the frames of slots whose heads have been read; damage is added to `report`.

    Damaged is what decode_frame refuses, and a frame that is not of this shape. Nothing that a
    frame holds makes this read or write beside its arrays.
    """
    ranks, stride = slots.shape
    k, form = shape.k, FORMATS[shape.value_format]
    numbers = scratch.take(ranks * k, decoded_dtype(shape.value_format))
    places = scratch.take(ranks * k, torch.int64)
    found = scratch.take(ranks * k, torch.int32)
    exact = {"enable_fp_fusion": False}
    payload = slots.view(-1)[HEAD_BYTES:]
    tiled = {"RICE": shape.rice_bits, "WIDE": shape.entry_words, "HEADER": shape.header_bytes}
    if shape.tiles:
        grid = (shape.tiles, ranks)
        indices.find_ones[grid](
            payload, stride, heads, report, shape.numel, found, k, shape.tiles,
            HEAD=_HEAD_NUMBERS, CHUNK=512, **tiled, **exact,
        )  # fmt: skip
        indices.read_indices[grid](
            payload, stride, heads, report, shape.numel, found, k, shape.tiles, places,
            HEAD=_HEAD_NUMBERS, **tiled, **exact,
        )  # fmt: skip
    elif k:
        torch.arange(k, out=places[:k])
        places.view(ranks, k)[1:] = places[:k]
    if k:
        frames.read_values[(-(-shape.blocks // _BLOCKS), ranks)](
            payload, stride, heads, report, shape.value_blocks, shape.blocks, k,
            shape.directory_bytes, shape.low_bytes, shape.listed, shape.listed.numel(), numbers,
            FORMAT=form, HEADER=shape.header_bytes, BLOCKS=_BLOCKS, **exact,
        )  # fmt: skip
    return Received(places.view(ranks, k), numbers.view(ranks, k), heads)


def _find_limits(bits: Tensor, bound: tuple[BoundTable, float], kind: int) -> None:
    table, factor = bound
    if table.leaf_count:
        bounds.sum_leaves[(-(-table.leaf_count // _LEAVES),)](
            bits, table.leaves, table.leaf_count, table.nodes, KIND=kind, LEAVES=_LEAVES,
            enable_fp_fusion=False,
        )  # fmt: skip
    bounds.sum_trees[(table.trees.shape[0],)](
        bits, table.trees, table.nodes, table.limits, factor, KIND=kind, CHUNK=256,
        enable_fp_fusion=False,
    )  # fmt: skip


def _sum_up(
    payload: Tensor, ranks: int, lengths: Tensor, stride: int, sums: Tensor, sums_stride: int
) -> None:
    """Add the checksums of frames to `sums`; they lie every `stride` bytes of payload."""
    room = payload.numel() if ranks == 1 else stride
    digits = max(1, -(-room.bit_length() // 8))
    checksum.checksum[(-(-room // _SUMMED_BYTES), ranks)](
        payload, stride, lengths, _HEAD_NUMBERS, tables_on(payload.device), sums, sums_stride,
        LOG_LANES=7, DIGITS=digits, enable_fp_fusion=False,
    )  # fmt: skip

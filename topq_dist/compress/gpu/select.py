"""Exact top-k of the segments of a vector on its device; the host neither waits nor is asked.

Source: the threshold that is used again is Ok-Topk's (Li and Hoefler, "Near-Optimal Sparse
Allreduce", PPoPP 2022). What is selected is exact, and the same to the bit as on the CPU: ties at
the k-th place go to the lowest indices.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from topq_dist.compress.gpu.kernels import select as kernels
from topq_dist.compress.gpu.memory import Arena, Scratch, to_device
from topq_dist.compress.sparsify.magnitude import check_vectors
from topq_dist.compress.sparsify.segments import Segments
from topq_dist.dtypes import FLOATS, Indices, key_of

# elements of a segment for one program, and how many of these it looks at a time once most of
# them are known not to be selected
BLOCK = 2048
CHUNK = 512
# a threshold is worth having that lets through no more than this; residuals that still grow let
# more pass it from step to step
_MOST_OF_K, _MOST_BESIDE, _OF_NUMEL = 4, 256, 64
_FIRST_SLACK = 0.03
# above every key
_NO_THRESHOLD = (1 << 63) - 1

KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
# shift and bits of each digit of a key, by the bits of a key
_DIGITS = {
    15: [(7, 8), (0, 7)],
    31: [(23, 8), (15, 8), (7, 8), (0, 7)],
    63: [*((shift, 8) for shift in range(55, 0, -8)), (0, 7)],
}


class DeviceSelection(NamedTuple):
    """The largest of all segments, on the device.

    indices: int64 (k,), ascending. values: (k,) of the sum's dtype. highest: int64 (1,), the
    largest key of the vector, which is finite where this is below that of infinity.
    """

    indices: Tensor
    values: Tensor
    highest: Tensor


def _most_candidates(numels: Indices, ks: Indices) -> Indices:
    """Return for how many candidates of segments there is room."""
    some = _MOST_OF_K * ks + _MOST_BESIDE + numels // _OF_NUMEL
    return np.where(ks > 0, np.minimum(numels, some), 0)


class SegmentTable:
    """What the kernels ask of segments, made once and kept on a device.

    Raises ValueError for segments of several rows, of which there may be more than it pays to
    make a table of.
    """

    def __init__(self, segments: Segments, device: torch.device) -> None:
        if not segments.in_single_rows:
            raise ValueError("segments of several rows: expected one row each")
        starts, _, numels, ks = segments.table.T
        rooms = _most_candidates(numels, ks)
        selected, found = np.cumsum(ks) - ks, np.cumsum(rooms) - rooms
        counts = -(-numels // BLOCK)
        first_blocks = np.concatenate([[0], np.cumsum(counts)])
        of_block = np.repeat(np.arange(len(segments)), counts)
        number = np.arange(of_block.size) - first_blocks[of_block]
        blocks = np.stack([of_block, starts[of_block] + number * BLOCK], axis=1)
        self.count = len(segments)
        self.block_count = int(of_block.size)
        self.k = int(ks.sum())
        self.ks = ks.copy()
        self.room = int(rooms.sum())
        columns = [starts, numels, ks, selected, found, rooms]
        table = np.concatenate([np.stack(columns, axis=1).ravel(), blocks.ravel(), first_blocks])
        whole = to_device(torch.from_numpy(table.astype(np.int64)), device)
        edges = [6 * self.count, 2 * self.block_count, self.count + 1]
        self.segments, self.blocks, self.first_blocks = whole.split(edges)  # type: ignore[no-untyped-call]


class DeviceSelector:
    """Selects from the segments of one flat vector, step after step, on its device.

    What it remembers of a segment goes by the segment's place.
    """

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._table: SegmentTable | None = None
        self._segments = Segments()
        self._lows = torch.empty(0, dtype=torch.int64)
        self._thresholds = self._slacks = torch.empty(0)

    def table(self, segments: Segments, device: torch.device) -> SegmentTable:
        """Return the table of these segments, the last one where they have not changed."""
        if self._table is None or segments is not self._segments:
            if self._table is None or segments != self._segments:
                self._table = SegmentTable(segments, device)
            self._segments = segments
        return self._table

    def select(
        self, gradient: Tensor, residual: Tensor | None, segments: Segments
    ) -> DeviceSelection:
        """Return the k largest magnitudes of each segment of gradient + residual; change neither.

        Both are as for Selector.select; `segments` cover them in order, in one row each. Raises
        ValueError for others.
        """
        check_vectors(gradient, residual)
        device = gradient.device
        table = self.table(segments, device)
        self._remember_for(table.count, device)
        dtype = gradient.dtype if residual is None else residual.dtype
        signed = FLOATS[dtype].signed
        indices = torch.empty(table.k, dtype=torch.int64, device=device)
        numbers = torch.empty(table.k, dtype=signed, device=device)
        if not table.block_count:
            highest = torch.zeros(1, dtype=torch.int64, device=device)
            return DeviceSelection(indices, numbers.view(dtype), highest)
        vectors = gradient.detach().view(FLOATS[gradient.dtype].signed), residual
        if residual is not None:
            vectors = vectors[0], residual.detach().view(signed)
        with self._arena.borrow(device) as scratch:
            highest = self._launch(vectors, gradient.dtype, dtype, table, indices, numbers, scratch)
        return DeviceSelection(indices, numbers.view(dtype), highest)

    def _launch(
        self,
        vectors: tuple[Tensor, Tensor | None],
        gradient_dtype: torch.dtype,
        dtype: torch.dtype,
        table: SegmentTable,
        indices: Tensor,
        numbers: Tensor,
        scratch: Scratch,
    ) -> Tensor:
        key_bits = 8 * dtype.itemsize - 1
        digits = _DIGITS[key_bits]
        zeroed = scratch.zeros(table.count + 1 + len(digits) * table.count * 128)
        reached, highest = zeroed[: table.count], zeroed[table.count : table.count + 1]
        histograms = zeroed[table.count + 1 :].view(torch.int32)
        narrowed = scratch.take(2 * len(digits) * table.count, torch.int64)
        listed = scratch.take(2 * table.block_count, torch.int64)
        places = scratch.take(2 * table.block_count, torch.int64)
        found_at = scratch.take(table.room, torch.int32)
        found_bits = scratch.take(table.room, torch.int64 if key_bits == 63 else torch.int32)
        grid = (table.block_count,)
        kind = {
            "KIND": KINDS[gradient_dtype],
            "HAS_RESIDUAL": vectors[1] is not None,
            "KEY_BITS": key_bits,
            "BLOCK": BLOCK,
            "enable_fp_fusion": False,
        }
        tables = (table.segments, table.blocks)
        found = (reached, listed, found_at, found_bits)
        kernels.find_candidates[grid](
            *vectors, *tables, self._lows, reached, listed, highest, found_at, found_bits,
            **kind, num_warps=8,
        )  # fmt: skip
        for digit, (shift, bits) in enumerate(digits):
            kernels.count_digits[grid](
                *vectors, *tables, *found, histograms, narrowed, table.count, digit,
                SHIFT=shift, BITS=bits, FIRST=digit == 0, CHUNK=CHUNK, **kind,
            )  # fmt: skip
        last = {"LAST_DIGIT": len(digits) - 1}
        kernels.count_selected[grid](
            *vectors, *tables, *found, histograms, narrowed, table.count, places,
            LAST_BITS=digits[-1][1], CHUNK=CHUNK, **last, **kind,
        )  # fmt: skip
        kernels.place_blocks[(table.count,)](
            table.segments, table.first_blocks, narrowed, table.count, places, highest,
            self._lows, self._thresholds, self._slacks, KIND=kind["KIND"],
            KEY_BITS=key_bits, INFINITE=key_of(float("inf"), dtype), CHUNK=256, **last,
            enable_fp_fusion=False,
        )  # fmt: skip
        kernels.write_selected[grid](
            *vectors, *tables, *found, narrowed, table.count, places, indices, numbers,
            CHUNK=CHUNK, **last, **kind,
        )  # fmt: skip
        # the only thing of the scratch that outlives the step
        return highest.clone()

    def _remember_for(self, count: int, device: torch.device) -> None:
        known = self._lows.numel()
        if known >= count and self._lows.device == device:
            return
        lows = torch.full((count,), _NO_THRESHOLD, dtype=torch.int64, device=device)
        thresholds = torch.zeros(count, device=device)
        slacks = torch.full((count,), _FIRST_SLACK, device=device)
        if self._lows.device == device:
            lows[:known], thresholds[:known] = self._lows, self._thresholds
            slacks[:known] = self._slacks
        self._lows, self._thresholds, self._slacks = lows, thresholds, slacks

"""The stages of TopKCompressor where the gradient is: nothing of them comes to the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from topq_dist.compress.compressor import Compressed, TopKCompressor
from topq_dist.compress.gpu.bounds import BoundTable
from topq_dist.compress.gpu.frames import (
    Written,
    check_frames,
    read_frames,
    slot_bytes,
    write_frame,
)
from topq_dist.compress.gpu.memory import Arena
from topq_dist.compress.gpu.select import DeviceSelector
from topq_dist.compress.gpu.shape import FORMATS, FrameShape
from topq_dist.compress.gpu.update import DeviceSelected, finish
from topq_dist.compress.layout import ChunkedVector, Layout, LayoutCache
from topq_dist.compress.sparsify.by_loss import SegmentsByLoss
from topq_dist.compress.sparsify.segments import Segment, Segments

__all__ = ["DeviceCompressor", "slot_bytes"]


class _Tables:
    """What is kept of a layout: its thresholds, and tables of its last segments."""

    def __init__(self, arena: Arena) -> None:
        self.selector = DeviceSelector(arena)
        self._made_for: tuple[Segments, str, torch.device] | None = None
        self._shape: FrameShape | None = None
        self._bound: BoundTable | None = None

    def of(
        self, segments: Segments, value_format: str, numel: int, device: torch.device
    ) -> tuple[FrameShape, BoundTable]:
        """Return the shape of a frame of these segments, and their table of bounds."""
        asked = segments, value_format, device
        if self._shape is None or self._bound is None or asked != self._made_for:
            ks = segments.table[:, 3]
            self._shape = FrameShape(numel=numel, ks=ks, value_format=value_format, device=device)
            self._bound = BoundTable(segments, device)
            self._made_for = asked
        return self._shape, self._bound


class DeviceCompressor(TopKCompressor):
    """Selects, codes, decodes and averages on one device, on a stream of its own.

    compressor: whose settings and residuals these are; of one of its value formats that is not in
    `formats` nothing can be made, nor with a decay.

    Its steps are TopKCompressor's to the bit, in this order: `compress`, `write`, and once every
    rank's slots are there, for all vectors `check`, then `finish`.
    """

    formats = frozenset(FORMATS)

    def __init__(self, compressor: TopKCompressor, device: torch.device) -> None:
        super().__init__(
            value_format=compressor.value_format,
            error_feedback=compressor.error_feedback,
            bound=compressor.bound,
        )
        self.residuals = compressor.residuals
        self.arena = Arena()
        self._tables = LayoutCache(lambda: _Tables(self.arena))
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def compress(
        self,
        gradient: Tensor | ChunkedVector,
        layout: Layout,
        segments: Sequence[Segment],
        *,
        parts: int = 1,
    ) -> Compressed:
        """Select on the device; the frame is made when there is a slot for it, see `write`.

        Raises ValueError for a vector in chunks, more than one part, and for segments of which each
        rank sends as much as it needs.
        """
        whole = gradient.whole if isinstance(gradient, ChunkedVector) else gradient
        if whole is None or parts != 1:
            raise ValueError(f"{parts} parts of a vector: expected one, of a vector in one piece")
        segments = Segments.of(segments)
        if isinstance(segments, SegmentsByLoss):
            raise ValueError(
                "q is by the loss by now: expected it to be so when the hook was made, which "
                "exchanges frames of one length on the device"
            )
        value_format = self._value_format(whole)
        with self.beside(whole.device):
            residual = self._residual(layout, whole) if self.error_feedback else None
            tables = self._tables.of(layout)
            shape, bound = tables.of(segments, value_format, whole.numel(), whole.device)
            selection = tables.selector.select(whole, residual, segments)
        clip = None if self.bound is None else (bound, self.bound)
        selected = DeviceSelected(whole, residual, selection, shape, clip)
        return Compressed(frames=[], on_device=selected)

    def write(
        self, selected: DeviceSelected, slot: Tensor, settings_digest: int, coherence: Tensor
    ) -> Written:
        """Write the frame of what has been selected into a slot; see write_frame."""
        with self.beside(slot.device), self.arena.borrow(slot.device) as scratch:
            return write_frame(
                selected.selection,
                selected.shape,
                selected.bound,
                slot,
                scratch,
                has_residual=selected.residual is not None,
                settings_digest=settings_digest,
                coherence=coherence,
            )

    def check(self, selected: DeviceSelected, slots: Tensor, report: Tensor) -> Tensor:
        """Read the heads of every rank's slot; see check_frames."""
        with self.beside(slots.device):
            return check_frames(slots, selected.shape, report)

    def finish(
        self,
        selected: DeviceSelected,
        written: Written,
        slots: Tensor,
        heads: Tensor,
        report: Tensor,
    ) -> None:
        """Read the frames, and end the step for one vector; see update.finish."""
        with self.beside(slots.device), self.arena.borrow(slots.device) as scratch:
            received = read_frames(slots, selected.shape, heads, report, scratch)
            finish(selected, written, received, report, scratch, divisor=slots.shape[0])

    @contextmanager
    def beside(self, device: torch.device) -> Iterator[None]:
        """Have what the block launches run beside later work of the stream that it is entered in.

        It begins where that stream is now.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            yield

    def rejoin(self, device: torch.device) -> None:
        """Have later work of the current stream wait for all that has been launched."""
        if self._stream is not None:
            torch.cuda.current_stream(device).wait_stream(self._stream)

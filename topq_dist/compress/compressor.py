"""Gradient to frame and back, stage by stage: compensate, select, quantize, encode."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from topq_dist.compress.aggregate import write_sum
from topq_dist.compress.codec.frame import Frame, encode_frame, encode_non_finite_frame
from topq_dist.compress.codec.values import check_value_format, quantize
from topq_dist.compress.coherence import NO_COHERENCE, Coherence
from topq_dist.compress.gpu import engine
from topq_dist.compress.gpu.memory import Arena
from topq_dist.compress.layout import ChunkedVector, Layout, LayoutCache
from topq_dist.compress.partition import BlockCyclicPartition, SplitIndices
from topq_dist.compress.residual import Residuals, ResidualUpdate
from topq_dist.compress.sparsify.bounding import bounded, check_bound
from topq_dist.compress.sparsify.by_loss import SegmentsByLoss, cut_to_need
from topq_dist.compress.sparsify.magnitude import Selection
from topq_dist.compress.sparsify.segments import (
    Segment,
    Segments,
    SegmentSelector,
    count_between,
)
from topq_dist.compress.sparsify.topk import Selector
from topq_dist.dtypes import (
    FLOATS,
    Indices,
    accumulate_dtype,
    key_of,
    zeros,
)
from topq_dist.validation import check_fraction

if TYPE_CHECKING:
    from topq_dist.compress.gpu.update import DeviceSelected


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """The frames of a vector, and what they leave of it.

    frames: 1-D uint8 on the CPU, one for each part.
    update: what makes the residual hold what they leave out, once the step is sure to count; None
        where nothing is kept.
    own: what decoding the only frame returns, where there is one and it holds values.
    vector: what was compressed, where it is finite and one chunk.
    in_segments: whether the values have been selected, and rounded, in more than one segment.
    coherence: of the vector with its residual, where it has been measured.
    encode_s: seconds in quantizing and encoding.
    on_device: what has been selected, where the frame is made on the device; see DeviceCompressor.
    """

    frames: list[Tensor]
    update: ResidualUpdate | None = None
    own: Frame | None = None
    vector: Tensor | None = None
    in_segments: bool = False
    coherence: Coherence = NO_COHERENCE
    encode_s: float = 0.0
    on_device: DeviceSelected | None = None


class TopKCompressor:
    """Turns flat vectors of named gradients into frames, and keeps what a frame leaves out.

    value_format: one of VALUE_FORMATS; None is the gradient's own dtype.
    error_feedback: keep what was not sent, value rounding included, and add it the next time.
    bound: clip what is sent to so many times the mean magnitude of what is selected of the same
        row of a segment; what is clipped is kept. None: send it as it is. A row of which half or
        more is selected is never clipped.
    residual_decay: what a residual is multiplied by before it is added, in [0, 1]; 1 without error
        feedback.

    Raises ValueError for an unknown value format, a residual_decay out of range or below 1 without
    error feedback, or a bound that is not above zero or comes without it; TypeError for an
    error_feedback that is no bool or a bound that is no number.
    """

    def __init__(
        self,
        *,
        value_format: str | None,
        error_feedback: bool,
        bound: float | None = None,
        residual_decay: float = 1.0,
    ) -> None:
        self.value_format = None if value_format is None else check_value_format(value_format)
        if not isinstance(error_feedback, bool):
            raise TypeError(f"error_feedback={error_feedback!r}: expected True or False")
        self.error_feedback = error_feedback
        self.bound = check_bound(bound, error_feedback=error_feedback)
        self.residual_decay = check_fraction("residual_decay", residual_decay)
        if residual_decay != 1.0 and not error_feedback:
            raise ValueError(
                f"residual_decay={residual_decay!r} with error_feedback=False: expected 1.0, since "
                "there is no residual"
            )
        self.residuals = Residuals()
        self._segment_selectors = LayoutCache(SegmentSelector)
        self._whole_selectors = LayoutCache(Selector)
        self._device_selectors = LayoutCache(partial(engine.make_selector, Arena()))

    def anew(self) -> TopKCompressor:
        """Return one of the same settings, which keeps nothing yet."""
        return TopKCompressor(
            value_format=self.value_format,
            error_feedback=self.error_feedback,
            bound=self.bound,
            residual_decay=self.residual_decay,
        )

    def settings(self) -> str:
        """Return the settings as text, the same for compressors that work alike."""
        feedback = f"error_feedback={self.error_feedback} bound={self.bound}"
        if self.residual_decay != 1.0:
            feedback += f" residual_decay={self.residual_decay}"
        return f"value_format={self.value_format} {feedback}"

    def compress(
        self,
        gradient: Tensor | ChunkedVector,
        layout: Layout,
        segments: Sequence[Segment],
        *,
        parts: int = 1,
    ) -> Compressed:
        """Return the largest magnitudes of gradient + residual, as frames; change neither.

        `gradient` is 1-D of any float dtype and laid out as `layout`; `segments` cover it in order,
        each within a chunk. There is one frame for each of `parts` parts of the vector, see
        BlockCyclicPartition, whose values are rounded segment by segment; where the sum is not
        finite, each of them says so. Only the update, applied while `gradient` is still what it
        was, makes the residual, fp32 or fp64, gradient + residual - sent: until then the step can
        be dropped as if it had not been.
        """
        vector = gradient if isinstance(gradient, ChunkedVector) else ChunkedVector([gradient])
        segments = Segments.of(segments)
        value_format = self._value_format(vector)
        partition = BlockCyclicPartition(numel=vector.numel, count=parts)
        numels = [partition.numel_of(part) for part in range(parts)]

        # 1. compensate: what earlier steps have left is added where it is looked at
        residual = self._residual(layout, vector) if self.error_feedback else None
        added = residual
        if residual is not None and self.residual_decay != 1.0:
            # a copy: until the update is applied nothing has happened
            added = zeros(residual.numel(), residual.dtype, residual.device)
            torch.mul(residual, self.residual_decay, out=added)

        # 2. select
        selected = self._select(vector, added, layout, segments)
        if not selected.finite:
            return Compressed(
                frames=[encode_non_finite_frame(numel, value_format) for numel in numels]
            )
        if isinstance(segments, SegmentsByLoss):
            selected, segments = cut_to_need(selected, segments, vector, added)
        indices, values = selected.indices, selected.values

        # 3. quantize
        began_s = time.perf_counter()
        sent = values if self.bound is None else bounded(values, segments, self.bound)
        split = partition.split(indices)
        sent = split.sort(sent)
        quantized = [
            quantize(sent[mine], value_format, segment_ks=ks)
            for mine, ks in zip(split.parts, _ks_of(split, segments), strict=True)
        ]

        # 4. encode
        frames = [
            encode_frame(numel, split.places[mine], rounded)
            for numel, mine, rounded in zip(numels, split.parts, quantized, strict=True)
        ]
        encode_s = time.perf_counter() - began_s

        update = own = None
        if residual is not None:
            # as the receivers will see them, in their places again
            received = split.unsort([rounded.decoded.numpy() for rounded in quantized])
            rest = torch.empty_like(values)
            np.subtract(values.numpy(), received, out=rest.numpy(), casting="same_kind")
            update = ResidualUpdate(
                layout=layout,
                residual=residual,
                decay=self.residual_decay,
                gradient=vector,
                indices=indices,
                rest=rest,
            )
        if parts == 1:
            decoded = quantized[0].decoded
            own = Frame(numel=vector.numel, indices=indices, values=decoded, finite=True)
        return Compressed(
            frames=frames,
            update=update,
            own=own,
            vector=vector.whole,
            in_segments=len(segments) > 1,
            encode_s=encode_s,
        )

    def _select(
        self, vector: ChunkedVector, residual: Tensor | None, layout: Layout, segments: Segments
    ) -> Selection:
        whole = vector.whole
        if whole is None or not segments.in_single_rows or not engine.runs_on(vector.device):
            return self._segment_selectors.of(layout).select(vector, residual, segments)
        found = self._device_selectors.of(layout).select(whole, residual, segments)
        finite = int(found.highest) < key_of(np.inf, found.values.dtype)
        return Selection(found.indices.cpu(), found.values.cpu(), finite)

    def compress_and_update(self, gradient: Tensor, layout: Layout, k: int) -> Tensor:
        """Return the frame of the k largest of gradient + residual, and update that at once.

        What compress and its update do for one segment; on the CPU with one pass over memory less,
        since the sum is made where its largest are looked for.
        """
        segment = Segment(start=0, rows=1, row_numel=gradient.numel(), k=k)
        in_one_pass = gradient.device.type == "cpu" and self.residual_decay == 1.0
        if not self.error_feedback or not in_one_pass or engine.runs_on(gradient.device):
            compressed = self.compress(gradient, layout, [segment])
            self.residuals.apply(compressed.update)
            return compressed.frames[0]
        value_format = self._value_format(gradient)
        residual = self._residual(layout, gradient)
        selector = self._whole_selectors.of(layout)
        with selector.accumulate_and_select(residual, gradient, k) as selected:
            if not selected.finite:
                return encode_non_finite_frame(gradient.numel(), value_format)
            values = selected.values
            sent = values if self.bound is None else bounded(values, [segment], self.bound)
            quantized = quantize(sent, value_format)
            frame = encode_frame(gradient.numel(), selected.indices, quantized)
            residual.numpy()[selected.indices.numpy()] = quantized.error(values)
        return frame

    def update_and_write(
        self, compressed: Compressed, frames: Sequence[Frame], *, divisor: int
    ) -> None:
        """Apply the update; afterwards the vector is what write_sum makes of these frames.

        They are finite, and used up. Raises ValueError where there is no vector of one chunk.
        """
        vector = compressed.vector
        if vector is None:
            raise ValueError("no finite vector in one piece to write into")
        dtypes = {frame.values.dtype for frame in frames}
        if compressed.update and vector.device.type == "cpu" and dtypes == {vector.dtype}:
            # in one pass
            for frame in frames:
                frame.values.div_(divisor)
            self.residuals.apply(compressed.update, replace_by=frames)
        else:
            self.residuals.apply(compressed.update)
            write_sum(frames, divisor=divisor, out=vector)

    def flush_residual(
        self, layout: Layout, gradient: Tensor, share: float
    ) -> ResidualUpdate | None:
        """Add a share in (0, 1] of the residual of `layout` to `gradient`, which travels whole.

        Returns the update for when it has arrived, or None where there is no residual. A name with
        an all-zero gradient keeps its own: where no rank has used it, its average goes nowhere.
        """
        if not self.residuals.holds(layout):
            return None
        residual = self._residual(layout, gradient)
        used = [where for where in layout.slices() if bool(gradient[where].any())]
        for where in used:
            gradient[where].add_(residual[where], alpha=share)
        return ResidualUpdate(layout=layout, residual=residual, flushed=used, flushed_share=share)

    def _value_format(self, gradient: Tensor | ChunkedVector) -> str:
        if gradient.dtype not in FLOATS:
            known = ", ".join(str(dtype) for dtype in FLOATS)
            raise TypeError(f"gradient has dtype {gradient.dtype}: expected one of {known}")
        return self.value_format or FLOATS[gradient.dtype].value_format

    def _residual(self, layout: Layout, gradient: Tensor | ChunkedVector) -> Tensor:
        dtype = accumulate_dtype(gradient.dtype)
        return self.residuals.flat(layout, dtype=dtype, device=gradient.device)


def _ks_of(split: SplitIndices, segments: Segments) -> list[Indices]:
    """Return of each part how many of its values are of each segment."""
    if split.order is None:
        return [segments.ks]
    return [count_between(split.order[mine], segments.ends) for mine in split.parts]

"""Gradient to frame and back: compensate, select, quantize, frame, in a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from topq_dist.compress.feedback import Layout, Residuals
from topq_dist.compress.frame import (
    Buffer,
    decode_frame,
    encode_frame,
    encode_non_finite_frame,
)
from topq_dist.compress.selection import Selection, Selector, select_rows
from topq_dist.compress.values import check_value_format
from topq_dist.topq import check_fraction, kept_count

_OWN_FORMAT = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A stretch of a flat vector seen as (rows, row_numel), of each row of which `kept` survive."""

    start: int
    rows: int
    row_numel: int
    kept: int

    @property
    def stretch(self) -> slice:
        """Where in the flat vector the cut lies."""
        return slice(self.start, self.start + self.rows * self.row_numel)


def at_least_one(q: float, numel: int) -> int:
    """Return top-Q's k, but 1 where it is 0 and neither q is 1 nor the vector empty."""
    return max(kept_count(q, numel), int(q < 1.0 and numel > 0))


class FlatCompressor:
    """Turns flat vectors of named gradients into frames, and keeps what a frame leaves out.

    value_format: one of "fp32", "fp16", "bf16", "int8", "int4", "int2", "fp64"; None is the
        gradient's own dtype.
    error_feedback: keep what was not sent, value rounding included, and add it the next time.

    Raises ValueError for an unknown value format.
    """

    def __init__(self, *, value_format: str | None, error_feedback: bool) -> None:
        self.value_format = None if value_format is None else check_value_format(value_format)
        self.error_feedback = error_feedback
        self.residuals = Residuals()
        self._selectors: dict[tuple[tuple[str, ...], int], list[Selector]] = {}

    def settings(self) -> str:
        """Return the settings as text, the same for compressors that work alike."""
        return f"value_format={self.value_format} error_feedback={self.error_feedback}"

    def compress(
        self, gradient: Tensor, layout: Layout, cuts: Sequence[Cut], *, parts: int = 1
    ) -> list[Tensor]:
        """Return the largest magnitudes of gradient + residual as frames (1-D uint8, CPU).

        `gradient` is 1-D of any float dtype and laid out as `layout`; `cuts` cover it in order.
        There is one frame for each of `parts` stretches of the vector, cut at `part_edges`. The
        residual, fp32 or fp64, becomes gradient + residual - sent. Where the gradient is not
        finite every frame says so, and the residual stays as it was.
        """
        own_format = _own_format(gradient.dtype)
        value_format = self.value_format or own_format
        edges = part_edges(gradient.numel(), parts)
        selectors = self._selectors.setdefault((layout.names, len(cuts)), [])
        selectors.extend(Selector() for _ in range(len(cuts) - len(selectors)))
        residual = None
        if self.error_feedback:
            residual = self._residual(layout, gradient)
            selected = _compensated_parts(gradient, residual, cuts, selectors)
        else:
            selected = _parts(gradient, cuts, selectors)
        if selected is None:
            return [
                encode_non_finite_frame(stop - start, value_format)
                for start, stop in pairwise(edges)
            ]
        indices = torch.cat([s.indices + cut.start for s, cut in zip(selected, cuts, strict=True)])
        values = torch.cat([s.values for s in selected])
        frames = []
        inner_edges = torch.searchsorted(indices, torch.tensor(edges, device=indices.device))
        for (start, stop), (low, high) in zip(
            pairwise(edges), pairwise(inner_edges.tolist()), strict=True
        ):
            sent = values[low:high]
            frame, decoded = encode_frame(
                stop - start, indices[low:high] - start, sent, value_format
            )
            frames.append(frame)
            if residual is not None:
                residual[indices[low:high]] = sent - decoded
        return frames

    def pay(self, layout: Layout, gradient: Tensor) -> None:
        """Add all that is still owed to `gradient`, which then travels whole; owe nothing more.

        Where the gradient is not finite nothing is added, and all is still owed.
        """
        if self.residuals.holds(layout) and bool(torch.isfinite(gradient).all()):
            gradient += self._residual(layout, gradient)
            self.residuals.drop(layout)

    def _residual(self, layout: Layout, gradient: Tensor) -> Tensor:
        return self.residuals.flat(
            layout, dtype=_residual_dtype(gradient.dtype), device=gradient.device
        )


def part_edges(numel: int, parts: int) -> list[int]:
    """Return the parts + 1 edges that cut range(numel) into stretches as equal as can be."""
    return [numel * part // parts for part in range(parts + 1)]


class Compressor:
    """Compresses named gradients to frames and back: for users with a transport of their own.

    q: fraction of each gradient that is not sent, in [0, 1]; at least one element is, unless q is
        1. May be set anew between gradients.
    value_format: how kept values travel: "fp32", "fp16", "bf16", "int8", "int4", "int2", "fp64".
    error_feedback: keep what was not sent and add it to the next gradient of the same name.

    Raises TypeError or ValueError for a value out of place, naming it.
    """

    def __init__(
        self, *, q: float = 0.99, value_format: str = "fp16", error_feedback: bool = True
    ) -> None:
        self.q = check_fraction("q", q)
        self._flat = FlatCompressor(value_format=value_format, error_feedback=error_feedback)

    def compress(self, name: str, gradient: Tensor) -> Tensor:
        """Return the frame of the top-Q part of `gradient` plus what `name` still owes.

        gradient: dense, of any shape and float dtype. The frame is a 1-D uint8 tensor on the CPU.
        Raises ValueError where `name` came with another shape before.
        """
        q = check_fraction("q", self.q)
        numel = gradient.numel()
        cut = Cut(start=0, rows=1, row_numel=numel, kept=at_least_one(q, numel))
        layout = Layout(names=(name,), shapes=(tuple(gradient.shape),))
        (frame,) = self._flat.compress(gradient.detach().reshape(-1), layout, [cut])
        return frame

    def decompress(self, frame: Buffer, out: Tensor) -> Tensor:
        """Write the dense gradient of `frame` into `out`, zeros included, and return it.

        Raises FrameError for bytes that are no frame of `out`'s number of elements; `out` is then
        as it was.
        """
        return average([frame], out=out)

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the residuals by name."""
        return self._flat.residuals.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the residuals by those of `state`."""
        self._flat.residuals.load_state_dict(state)


def average(frames: Sequence[Buffer], *, out: Tensor) -> Tensor:
    """Write the mean of the frames' dense vectors into `out`, and return it.

    `out` is contiguous, of any shape and float dtype. The terms are divided first and added in
    the order of the frames, as DistributedDataParallel does with dense gradients. Raises
    FrameError, leaving `out` as it was, for bytes that are no frame of out.numel() elements.
    """
    decoded = [decode_frame(frame, numel=out.numel()) for frame in frames]
    flat = out.view(-1)
    # half precision would round once a frame
    total = torch.zeros_like(flat, dtype=_residual_dtype(flat.dtype)) if len(frames) > 1 else flat
    total.zero_()
    for frame in decoded:
        frame.values.div_(len(frames))
        frame.add_to(total)
    if total is not flat:
        flat.copy_(total)
    return out


def _own_format(dtype: torch.dtype) -> str:
    if dtype not in _OWN_FORMAT:
        known = ", ".join(str(dtype) for dtype in _OWN_FORMAT)
        raise TypeError(f"gradient has dtype {dtype}: expected one of {known}")
    return _OWN_FORMAT[dtype]


def _residual_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _compensated_parts(
    gradient: Tensor, residual: Tensor, cuts: Sequence[Cut], selectors: Sequence[Selector]
) -> list[Selection] | None:
    """residual += gradient, then select; None, and nothing added, where the sum is not finite."""
    pairs = [(gradient[cut.stretch], residual[cut.stretch]) for cut in cuts]
    # all of them before the first is added to: a frame is sent whole or not at all
    if not all(
        selector.sum_is_finite(*pair) for selector, pair in zip(selectors, pairs, strict=True)
    ):
        return None
    parts = []
    for cut, selector, (new, owed) in zip(cuts, selectors, pairs, strict=True):
        if cut.rows == 1:
            parts.append(selector.compensate_and_select(new, owed, cut.kept, checked=True))
        else:
            owed += new
            parts.append(select_rows(owed.view(cut.rows, cut.row_numel), cut.kept))
    return parts


def _parts(
    gradient: Tensor, cuts: Sequence[Cut], selectors: Sequence[Selector]
) -> list[Selection] | None:
    """Select from the gradient as it is; None where what is selected is not finite."""
    parts = [
        selector.select(gradient[cut.stretch], cut.kept)
        if cut.rows == 1
        else select_rows(gradient[cut.stretch].view(cut.rows, cut.row_numel), cut.kept)
        for cut, selector in zip(cuts, selectors, strict=True)
    ]
    return parts if all(part.finite for part in parts) else None

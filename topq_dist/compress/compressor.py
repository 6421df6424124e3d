"""Gradient to frame and back: compensate, select, quantize, frame, in a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from topq_dist.compress.aggregate import average, sparse_mean, terms_of, write_sum
from topq_dist.compress.codec.frame import (
    Buffer,
    EncodedFrame,
    Frame,
    decode_frame,
    encode_frame,
    encode_non_finite_frame,
    peek_header,
)
from topq_dist.compress.codec.values import check_value_format
from topq_dist.compress.coherence import NO_COHERENCE, Coherence
from topq_dist.compress.layout import ByLayout, Layout, Pieces
from topq_dist.compress.partition import Parts
from topq_dist.compress.residual import Residuals, Terms, add_terms, settle
from topq_dist.compress.sparsify.bounding import bounded, check_bound
from topq_dist.compress.sparsify.segments import Cut, CutSelector, count_between
from topq_dist.compress.sparsify.topk import Selector
from topq_dist.dtypes import FLOATS, accumulate_dtype
from topq_dist.sparsity import at_least_one
from topq_dist.validation import check_fraction


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """The frames of a vector; one of the other methods, called once, keeps what they leave out.

    own: what decoding the only frame returns, where there is one and it holds values.
    vector: what was compressed, where it is finite and lies in one piece.
    coherence: of the vector with its residual, where it has been measured.
    settle_with: does the keeping; with terms the vector becomes their sum.
    """

    frames: list[Tensor]
    own: Frame | None = None
    vector: Tensor | None = None
    coherence: Coherence = NO_COHERENCE
    settle_with: Callable[[Terms | None], None] = lambda _: None

    def commit(self) -> None:
        """Keep what the frames leave out."""
        self.settle_with(None)

    def commit_and_write(self, frames: Sequence[Frame], *, divisor: int) -> None:
        """Do what commit does; afterwards the vector is what write_sum makes of these frames.

        They are finite, and used up. Raises ValueError where there is no vector in one piece.
        """
        if self.vector is None:
            raise ValueError("no finite vector in one piece to write into")
        dtypes = {frame.values.dtype for frame in frames}
        if self.vector.device.type == "cpu" and dtypes == {self.vector.dtype}:
            # in one pass
            self.settle_with(terms_of(frames, divisor=divisor))
        else:
            self.commit()
            write_sum(frames, divisor=divisor, out=self.vector)


class Reduced(NamedTuple):
    """The frame of a part's mean; `commit`, called at most once, keeps what it leaves out."""

    frame: Tensor
    commit: Callable[[], None]


class FlatCompressor:
    """Turns flat vectors of named gradients into frames, and keeps what a frame leaves out.

    value_format: one of "fp32", "fp16", "bf16", "int8", "int4", "int2", "fp64"; None is the
        gradient's own dtype.
    error_feedback: keep what was not sent, value rounding included, and add it the next time.
    bound: clip what is sent to so many times the mean magnitude of what is selected of the same
        row of a cut; what is clipped is kept. None: send it as it is. A row of which half or more
        is selected is never clipped.

    Raises ValueError for an unknown value format, or a bound that is not above zero or comes
    without error feedback; TypeError for an error_feedback that is no bool or a bound that is no
    number.
    """

    def __init__(
        self, *, value_format: str | None, error_feedback: bool, bound: float | None = None
    ) -> None:
        self.value_format = None if value_format is None else check_value_format(value_format)
        if not isinstance(error_feedback, bool):
            raise TypeError(f"error_feedback={error_feedback!r}: expected True or False")
        self.error_feedback = error_feedback
        self.bound = check_bound(bound, error_feedback=error_feedback)
        self.residuals = Residuals()
        self._cut_selectors = ByLayout(CutSelector)
        self._whole_selectors = ByLayout(Selector)
        self._mean_selectors = ByLayout(Selector)

    def settings(self) -> str:
        """Return the settings as text, the same for compressors that work alike."""
        feedback = f"error_feedback={self.error_feedback} bound={self.bound}"
        return f"value_format={self.value_format} {feedback}"

    def compress(
        self, gradient: Tensor | Pieces, layout: Layout, cuts: Sequence[Cut], *, parts: int = 1
    ) -> Compressed:
        """Return the largest magnitudes of gradient + residual, as frames.

        `gradient` is 1-D of any float dtype and laid out as `layout`; `cuts` cover it in order,
        each within a piece.
        There is one frame (1-D uint8, CPU) for each of `parts` Parts of the vector, with a segment
        for each cut; where the sum is not finite, each of them says so. Only `commit`, called while
        `gradient` is still what it was, makes the residual, fp32 or fp64, gradient + residual -
        sent: until then the step can be dropped as if it had not been.
        """
        gradient = gradient if isinstance(gradient, Pieces) else Pieces([gradient])
        own_format = _own_format(gradient.dtype)
        value_format = self.value_format or own_format
        dealt = Parts(numel=gradient.numel, count=parts)
        residual = self._residual(layout, gradient) if self.error_feedback else None
        selected = self._cut_selectors.of(layout).select(gradient, residual, cuts)
        if not selected.finite:
            numels = [dealt.numel_of(part) for part in range(parts)]
            return Compressed(
                frames=[encode_non_finite_frame(numel, value_format) for numel in numels]
            )
        indices, values = selected.indices, selected.values
        sent = self._bounded(values, cuts)
        ends = np.cumsum([cut.rows * cut.kept for cut in cuts])
        encoded, rest = [], torch.empty_like(values)
        for part, (mine, places) in enumerate(dealt.deal(indices)):
            ks = np.diff(ends, prepend=0) if isinstance(mine, slice) else count_between(mine, ends)
            numel = dealt.numel_of(part)
            encoded.append(encode_frame(numel, places, sent[mine], value_format, segment_ks=ks))
            if residual is not None:
                rest[mine] = torch.from_numpy(_rest(values[mine], encoded[-1]))

        def settle_with(terms: Terms | None) -> None:
            for stretch, piece, mine in gradient.shared_out(indices):
                if residual is not None:
                    places = indices[mine] - stretch.start if stretch.start else indices[mine]
                    settle(residual[stretch], piece, places, rest[mine], replace_by=terms)
                elif terms is not None:
                    add_terms(piece.zero_(), terms)

        own = None
        if parts == 1:
            own = Frame(
                numel=gradient.numel, indices=indices, values=encoded[0].decoded, finite=True
            )
        return Compressed(
            frames=[frame for frame, _ in encoded],
            own=own,
            vector=gradient.whole,
            settle_with=settle_with,
        )

    def compress_and_commit(self, gradient: Tensor, layout: Layout, kept: int) -> Tensor:
        """Return the frame of the `kept` largest of gradient + residual, and keep the rest at once.

        What compress and commit do for one cut; on the CPU with one pass over memory less.
        """
        cut = Cut(start=0, rows=1, row_numel=gradient.numel(), kept=kept)
        if not self.error_feedback or gradient.device.type != "cpu":
            compressed = self.compress(gradient, layout, [cut])
            compressed.commit()
            return compressed.frames[0]
        own_format = _own_format(gradient.dtype)
        numel, value_format = gradient.numel(), self.value_format or own_format
        residual = self._residual(layout, gradient)
        selector = self._whole_selectors.of(layout)
        with selector.taking_up(residual, gradient, kept) as selected:
            if not selected.finite:
                return encode_non_finite_frame(numel, value_format)
            sent = self._bounded(selected.values, [cut])
            encoded = encode_frame(numel, selected.indices, sent, value_format)
            residual.numpy()[selected.indices.numpy()] = _rest(selected.values, encoded)
        return encoded.frame

    def reduce(self, frames: Sequence[Buffer], layout: Layout, *, part: int, parts: int) -> Reduced:
        """Return the mean of the ranks' frames of one of `parts` Parts, as one frame.

        With error feedback, which needs `compress` to have seen `layout`, it holds the largest of
        those that are not zero, as many as the frames do on average, rounded up; `commit` makes the
        rest this rank's to owe. Without, it holds all that are not zero. Where a frame has segments
        the mean has one for each tensor. It says non-finite where a frame does, or the mean is past
        what could be owed. Raises FrameError for bytes that are no frame of that part.
        """
        dealt = Parts(numel=layout.numel, count=parts)
        numel = dealt.numel_of(part)
        received = [decode_frame(frame, numel=numel) for frame in frames]
        headers = [peek_header(frame) for frame in frames]
        value_format = headers[0].value_format
        sent = sum(frame.values.numel() for frame in received)
        mean = sparse_mean(received) if all(frame.finite for frame in received) else None
        if mean is None or not _peak(mean) < self._mean_limit(layout, len(frames)):
            return Reduced(encode_non_finite_frame(numel, value_format), _keep_nothing)

        def encode(places: Tensor, values: Tensor) -> EncodedFrame:
            ks = None
            if any(header.segment_bytes for header in headers):
                ends = np.array([stretch.stop for stretch in layout.stretches()])
                ks = count_between(dealt.gather(part, places), ends)
            return encode_frame(numel, places, values, value_format, segment_ks=ks)

        if not self.error_feedback:
            return Reduced(encode(mean.indices, mean.values).frame, _keep_nothing)
        indices, rest = mean.indices.numpy(), mean.values.numpy()
        # fewer than were sent are left where ranks chose the same, and their values cancel out
        kept = min(-(-sent // len(frames)), rest.size)
        selected = self._mean_selectors.of(layout).select(mean.values, kept)
        encoded = encode(mean.indices[selected.indices], selected.values)
        rest[selected.indices.numpy()] = _rest(selected.values, encoded)
        some = rest.nonzero()[0]
        # owed by one rank of many, and divided by their number when it is paid
        owed = Frame(
            numel=layout.numel,
            indices=dealt.gather(part, torch.from_numpy(indices[some])),
            values=torch.from_numpy(rest[some] * len(frames)),
            finite=True,
        )
        return Reduced(encoded.frame, lambda: owed.add_to(self.residuals.home(layout)))

    def pay(self, layout: Layout, gradient: Tensor, share: float) -> Callable[[], None] | None:
        """Add a share in (0, 1] of what is owed for `layout` to `gradient`, which travels whole.

        Returns what to call once it has arrived, or None where nothing is owed. A name with an
        all-zero gradient is paid nothing: where no rank has used it, its average goes nowhere.
        """
        if not self.residuals.holds(layout):
            return None
        residual = self._residual(layout, gradient)
        used = [stretch for stretch in layout.stretches() if bool(gradient[stretch].any())]
        for stretch in used:
            gradient[stretch].add_(residual[stretch], alpha=share)

        def settled() -> None:
            if share == 1.0 and len(used) == len(layout.names):
                self.residuals.drop(layout)
            for stretch in used:
                residual[stretch].mul_(1.0 - share)

        return settled

    def _bounded(self, values: Tensor, cuts: Sequence[Cut]) -> Tensor:
        return values if self.bound is None else bounded(values, cuts, self.bound)

    def _mean_limit(self, layout: Layout, ranks: int) -> float:
        # what is owed is as many times the mean
        if not self.error_feedback:
            return math.inf
        return torch.finfo(self.residuals.home(layout).dtype).max / ranks

    def _residual(self, layout: Layout, gradient: Tensor | Pieces) -> Tensor:
        return self.residuals.flat(
            layout, dtype=accumulate_dtype(gradient.dtype), device=gradient.device
        )


class Compressor:
    """Compresses named gradients to frames and back: for users with a transport of their own.

    q: fraction of each gradient that is not sent, in [0, 1]; at least one element is, unless q is
        1. May be set anew between gradients.
    value_format: how kept values travel: "fp32", "fp16", "bf16", "int8", "int4", "int2", "fp64".
    error_feedback: keep what was not sent and add it to the next gradient of the same name.
    bound: send no magnitude above so many times the mean of those sent with it, and keep what is
        clipped; None: no bound. Only with error feedback; what is half sent or more is not
        clipped.

    With error feedback it takes room for a residual of each name, and each thread that compresses
    for one more, the largest, and for 12 bytes for each of the candidates: four times as many as
    are sent, or fewer. Raises TypeError or ValueError for a value out of place, naming it.
    """

    def __init__(
        self,
        *,
        q: float = 0.99,
        value_format: str = "fp16",
        error_feedback: bool = True,
        bound: float | None = None,
    ) -> None:
        self.q = check_fraction("q", q)
        self._flat = FlatCompressor(
            value_format=value_format, error_feedback=error_feedback, bound=bound
        )

    def compress(self, name: str, gradient: Tensor) -> Tensor:
        """Return the frame of the top-Q part of `gradient` plus what `name` still owes.

        gradient: dense, of any shape and float dtype. The frame is a 1-D uint8 tensor on the CPU.
        Raises TypeError for what is no name or gradient, ValueError where `name` came with another
        shape before.
        """
        if not isinstance(name, str):
            raise TypeError(f"name={name!r}: expected a string")
        if not isinstance(gradient, Tensor):
            raise TypeError(f"gradient is a {type(gradient).__name__}: expected a tensor")
        if gradient.layout != torch.strided or gradient.is_meta:
            raise TypeError(
                f"gradient has layout {gradient.layout} on {gradient.device}: expected a dense "
                "tensor with data"
            )
        kept = at_least_one(check_fraction("q", self.q), gradient.numel())
        layout = Layout(names=(name,), shapes=(tuple(gradient.shape),))
        return self._flat.compress_and_commit(_flat(gradient), layout, kept)

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


def _flat(gradient: Tensor) -> Tensor:
    flat = gradient.detach()
    # expanded and lazily negated gradients are dense too, but not as memory has them; to ask is
    # cheaper than to call what would do nothing
    if flat.is_neg():
        flat = flat.resolve_neg()
    return flat if flat.dim() == 1 and flat.is_contiguous() else flat.reshape(-1).contiguous()


def _rest(values: Tensor, encoded: EncodedFrame) -> npt.NDArray[np.floating]:
    # numpy, since torch would wake its threads
    wide = values.numpy()
    rest: npt.NDArray[np.floating] = wide - encoded.decoded.numpy()
    # "fp64" decodes to more than narrower values need
    return rest.astype(wide.dtype, copy=False)


def _peak(frame: Frame) -> float:
    values = frame.values.numpy()
    return float(max(values.max(initial=0.0), -values.min(initial=0.0)))


def _keep_nothing() -> None:
    pass


def _own_format(dtype: torch.dtype) -> str:
    if dtype not in FLOATS:
        known = ", ".join(str(dtype) for dtype in FLOATS)
        raise TypeError(f"gradient has dtype {dtype}: expected one of {known}")
    return FLOATS[dtype].value_format

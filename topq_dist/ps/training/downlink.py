"""Updates for workers after a step: exactly what changed, a top-Q part of it, or everything.

Payloads are encoded once, in memory that later steps leave alone, and sent to all workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from topq_dist.compress.codec.frame import encode_frame
from topq_dist.compress.codec.values import check_value_format, quantize
from topq_dist.compress.layout import ChunkedVector
from topq_dist.compress.sparsify.segments import SegmentSelector, count_between, uniform_segments
from topq_dist.dtypes import accumulate_dtype
from topq_dist.ps.model.flat import FlatModel, picked, put, raw_view, zeros
from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.model.update import Change, SparseDelta, added, changes_between, set_frames
from topq_dist.ps.protocol.config import TrainingConfig
from topq_dist.ps.protocol.types import UpdateKind


class Payloads(NamedTuple):
    """The kind of an update, and its payload for each vector."""

    kind: UpdateKind
    parts: tuple[memoryview, ...]


class Downlink(Protocol):
    """Turns what a step did to the parameters into payloads."""

    def before_step(self, params: FlatModel) -> None:
        """Look at the parameters before a step that can change all of them."""

    def after_step(self, params: FlatModel, touched: Sequence[SparseDelta] | None) -> Payloads:
        """Return the payloads that bring workers up to date; `touched` is for each vector."""

    def nothing(self) -> Payloads:
        """Return the payloads of a version in which nothing has changed."""

    def held(self, params: FlatModel) -> FlatModel:
        """Return a copy of what workers hold."""

    def state(self) -> list[Tensor]:
        """Return, as views, what a snapshot must keep besides the parameters."""

    def load_state(self, tensors: Sequence[Tensor], params: FlatModel) -> None:
        """Go on from `tensors`, once `state` of a server with these parameters."""


def check_downlink(config: TrainingConfig) -> None:
    """Raise ValueError, naming it, for a setting with which workers would learn nothing."""
    if config.value_format is not None:
        check_value_format(config.value_format)
    if config.downlink == "topq" and config.q == 1:
        raise ValueError("q=1 with downlink='topq': expected less, or workers are sent nothing")


def make_downlink(config: TrainingConfig, params: FlatModel) -> Downlink:
    """Return the downlink of this configuration, for workers that hold `params`."""
    check_downlink(config)
    if config.downlink == "topq":
        return TopQDownlink(params, q=config.q, value_format=config.value_format)
    if config.downlink == "dense":
        return DenseDownlink(params.spec)
    return ExactDownlink(params.spec)


class DenseDownlink:
    """Sends every parameter as it is after each step."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec

    def before_step(self, params: FlatModel) -> None:
        """Do nothing: nothing is compared."""

    def after_step(self, params: FlatModel, touched: Sequence[SparseDelta] | None) -> Payloads:
        """Return a copy of all parameters."""
        return _full(params)

    def nothing(self) -> Payloads:
        """Return empty frames to set."""
        return _nothing(UpdateKind.SET, self._spec)

    def held(self, params: FlatModel) -> FlatModel:
        """Return a copy of the parameters: workers hold them."""
        return params.clone()

    def state(self) -> list[Tensor]:
        """Return nothing: all there is are the parameters."""
        return []

    def load_state(self, tensors: Sequence[Tensor], params: FlatModel) -> None:
        """Take nothing back."""


class ExactDownlink:
    """Sends the new values of the elements whose bits changed, or all where that is smaller.

    Where a step says what it touched, the cost is in proportion to that; else the parameters are
    compared with a copy from before the step.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._copy: FlatModel | None = None
        # a copy that is also the payload of an update must not be written into
        self._sent = False

    def before_step(self, params: FlatModel) -> None:
        """Copy the parameters, unless the last step's copy still fits."""
        if self._copy is None:
            self._copy, self._sent = params.clone(), False

    def after_step(self, params: FlatModel, touched: Sequence[SparseDelta] | None) -> Payloads:
        """Return frames to set, or all parameters."""
        if touched is not None:
            self._copy = None
            changes: list[Change] | None = [there.change() for there in touched]
        else:
            changes = None if self._copy is None else changes_between(self._copy, params)
        frames = None if changes is None else set_frames(self._spec, changes)
        if changes is None or frames is None:
            self._copy, self._sent = params.clone(), True
            return Payloads(UpdateKind.FULL, tuple(self._copy.raw()))
        if self._copy is not None:
            self._keep_up(params, self._copy, changes)
        return Payloads(UpdateKind.SET, tuple(frames))

    def nothing(self) -> Payloads:
        """Return empty frames to set."""
        return _nothing(UpdateKind.SET, self._spec)

    def held(self, params: FlatModel) -> FlatModel:
        """Return a copy of the parameters: workers hold them."""
        return params.clone()

    def state(self) -> list[Tensor]:
        """Return nothing: all there is are the parameters."""
        return []

    def load_state(self, tensors: Sequence[Tensor], params: FlatModel) -> None:
        """Forget the copy: the parameters are others now."""
        self._copy = None

    def _keep_up(self, params: FlatModel, copy: FlatModel, changes: list[Change]) -> None:
        if self._sent:
            self._copy, self._sent = params.clone(), False
            return
        for flat, change in zip(copy.flats, changes, strict=True):
            put(flat, *change)


class TopQDownlink:
    """Sends the top-Q part of parameters - shadow, where the shadow is what workers hold.

    What is not sent, value rounding included, stays in that difference: it is its own residual.
    value_format: None is each vector's own dtype.
    """

    def __init__(self, params: FlatModel, *, q: float, value_format: str | None) -> None:
        self._spec = params.spec
        self._value_format = value_format
        self._segments = [
            uniform_segments(vector.numels, q=q, scope="parameter")
            for vector in params.spec.vectors
        ]
        self._selectors = [SegmentSelector() for _ in params.spec.vectors]
        # kept negative, so that selecting from params - shadow is one fused pass; in fp32 for half
        # precision, as selection wants its residuals
        self._negative = [
            zeros(vector.numel, accumulate_dtype(vector.dtype)) for vector in params.spec.vectors
        ]
        self._catch_up(params)

    def before_step(self, params: FlatModel) -> None:
        """Do nothing: the shadow is what the parameters are compared with."""

    def after_step(self, params: FlatModel, touched: Sequence[SparseDelta] | None) -> Payloads:
        """Return frames to add, or all parameters where the difference is not finite."""
        chosen = self._largest(params)
        if chosen is None:
            self._catch_up(params)
            return _full(params)
        parts = []
        for vector, found, segments in zip(self._spec.vectors, chosen, self._segments, strict=True):
            value_format = self._value_format or vector.value_format
            # less than was asked for, where little has changed
            ks = count_between(found[0].numpy(), [segment.where.stop for segment in segments])
            quantized = quantize(found[1], value_format, segment_ks=ks)
            frame = encode_frame(vector.numel, found[0], quantized)
            parts.append((frame, found[0], quantized.decoded))
        for negative, vector, (_, indices, decoded) in zip(
            self._negative, self._spec.vectors, parts, strict=True
        ):
            # through the shadow itself: -(s + d) and -s - d differ in the sign of a zero
            shadow = picked(negative, indices).neg_().to(vector.dtype)
            put(negative, indices, added(shadow, decoded).to(negative.dtype).neg())
        return Payloads(UpdateKind.ADD, tuple(raw_view(frame) for frame, _, _ in parts))

    def nothing(self) -> Payloads:
        """Return empty frames to add."""
        return _nothing(UpdateKind.ADD, self._spec)

    def held(self, params: FlatModel) -> FlatModel:
        """Return a copy of the shadow."""
        shadow = FlatModel(self._spec)
        for flat, negative, now in zip(shadow.flats, self._negative, params.flats, strict=True):
            torch.neg(negative.to(flat.dtype), out=flat)
            # NaN is only ever there where all parameters were just sent, and conversion through
            # fp32 does not keep its bits
            unknown = flat.isnan()
            flat[unknown] = now[unknown]
        return shadow

    def state(self) -> list[Tensor]:
        """Return the negative shadow."""
        return list(self._negative)

    def load_state(self, tensors: Sequence[Tensor], params: FlatModel) -> None:
        """Go on from another negative shadow."""
        for negative, saved in zip(self._negative, tensors, strict=True):
            negative.copy_(saved)

    def _largest(self, params: FlatModel) -> list[tuple[Tensor, Tensor]] | None:
        """Return indices and values of what to send of each vector; None: they are not finite."""
        chosen = []
        for selector, flat, negative, segments in zip(
            self._selectors, params.flats, self._negative, self._segments, strict=True
        ):
            places, gaps, finite = selector.select(ChunkedVector([flat]), negative, segments)
            if not finite:
                return None
            kept = gaps != 0
            chosen.append((places, gaps) if bool(kept.all()) else (places[kept], gaps[kept]))
        return chosen

    def _catch_up(self, params: FlatModel) -> None:
        for negative, flat in zip(self._negative, params.flats, strict=True):
            torch.neg(negative.copy_(flat), out=negative)


def _full(params: FlatModel) -> Payloads:
    return Payloads(UpdateKind.FULL, tuple(params.clone().raw()))


def _nothing(kind: UpdateKind, spec: ModelSpec) -> Payloads:
    nowhere = torch.zeros(0, dtype=torch.int64)
    frames = [
        encode_frame(vector.numel, nowhere, quantize(torch.zeros(0), vector.value_format))
        for vector in spec.vectors
    ]
    return Payloads(kind, tuple(raw_view(frame) for frame in frames))

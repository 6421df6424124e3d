"""The frames of one part of a vector, one from each rank, reduced to the frame of their mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from topq_dist.compress.aggregate import sparse_mean
from topq_dist.compress.codec.frame import (
    Buffer,
    Frame,
    FrameHeader,
    decode_with_header,
    encode_frame,
    encode_non_finite_frame,
)
from topq_dist.compress.codec.values import Quantized, quantize
from topq_dist.compress.layout import Layout, LayoutCache
from topq_dist.compress.partition import BlockCyclicPartition
from topq_dist.compress.residual import Residuals, ResidualUpdate
from topq_dist.compress.sparsify.segments import count_between
from topq_dist.compress.sparsify.topk import Selector
from topq_dist.dtypes import Indices


class Reduced(NamedTuple):
    """The frame of a part's mean, and the update that keeps what it leaves out."""

    frame: Tensor
    update: ResidualUpdate | None = None


class PartReducer:
    """Reduces parts for one rank, which keeps what a mean's frame leaves out in its residual.

    residuals: None where there is no error feedback.
    """

    def __init__(self, residuals: Residuals | None) -> None:
        self._residuals = residuals
        self._selectors = LayoutCache(Selector)

    def reduce(
        self,
        frames: Sequence[Buffer],
        layout: Layout,
        *,
        part: int,
        parts: int,
        in_segments: bool = False,
    ) -> Reduced:
        """Return the mean of the ranks' frames of one of `parts` parts, as one frame.

        With residuals, which must hold `layout`, it has the largest of those that are not zero, as
        many as the frames do on average, rounded up; the update adds the rest to this rank's. With
        none it has all that are not zero. It says non-finite where a frame does, or the mean is
        past what a residual can hold. Raises FrameError for bytes that are no frame of that part.

        in_segments: whether the ranks' values are of more than one segment, of which a frame that
            holds values of one alone says nothing. The mean has one for each tensor then, as it has
            where a frame lists several.
        """
        partition = BlockCyclicPartition(numel=layout.numel, count=parts)
        numel = partition.numel_of(part)
        read = [decode_with_header(frame, numel=numel) for frame in frames]
        received, headers = [frame for frame, _ in read], [header for _, header in read]
        sent = sum(header.k for header in headers)
        mean = sparse_mean(received) if all(frame.finite for frame in received) else None
        if mean is None or not _peak(mean) < self._limit(layout, len(frames)):
            return Reduced(encode_non_finite_frame(numel, headers[0].value_format))
        if self._residuals is None:
            indices = partition.to_global(part, mean.indices)
            quantized = _quantize(mean.values, indices, layout, headers, in_segments)
            return Reduced(encode_frame(numel, mean.indices, quantized))
        rest, indices = mean.values.numpy(), partition.to_global(part, mean.indices)
        # fewer than were sent are left where ranks chose the same, and their values cancel out
        k = min(-(-sent // len(frames)), rest.size)
        selected = self._selectors.of(layout).select(mean.values, k)
        chosen = selected.indices.numpy()
        at = _at(indices, chosen)
        quantized = _quantize(selected.values, at, layout, headers, in_segments)
        rest[chosen] = quantized.error(selected.values)
        # in the residual of one rank of many, and divided by their number when it is sent
        rest *= len(frames)
        left = Frame(numel=layout.numel, indices=indices, values=mean.values, finite=True)
        residual = self._residuals.home(layout)
        update = ResidualUpdate(layout=layout, residual=residual, added=left)
        return Reduced(encode_frame(numel, _at(mean.indices, chosen), quantized), update)

    def _limit(self, layout: Layout, ranks: int) -> float:
        # what goes to the residual is as many times the mean
        if self._residuals is None:
            return math.inf
        return torch.finfo(self._residuals.home(layout).dtype).max / ranks


def _quantize(
    values: Tensor,
    indices: Tensor,
    layout: Layout,
    headers: Sequence[FrameHeader],
    in_segments: bool,
) -> Quantized:
    ks = None
    if in_segments or any(header.segment_bytes for header in headers):
        ks = count_between(indices.numpy(), layout.edges[1:])
    return quantize(values, headers[0].value_format, segment_ks=ks)


def _at(indices: Tensor, chosen: Indices) -> Tensor:
    # numpy, since torch takes several times as long to pick single elements
    return torch.from_numpy(indices.numpy().take(chosen))


def _peak(frame: Frame) -> float:
    values = frame.values.numpy()
    return float(max(values.max(initial=0.0), -values.min(initial=0.0)))

"""Segments of which no more is selected than what is lost calls for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from topq_dist.compress.kernels.scratch import BLOCK_NUMEL, blocks
from topq_dist.compress.layout import ChunkedVector
from topq_dist.compress.sparsify.magnitude import Selection
from topq_dist.compress.sparsify.segments import Segment, Segments
from topq_dist.dtypes import Indices, accumulate_dtype, cast
from topq_dist.q_policies import QByLoss


class SegmentsByLoss(Segments):
    """Segments whose k is the most that may be selected, and what is to be lost at most."""

    def __new__(cls, segments: Iterable[Segment], policy: QByLoss) -> Self:
        made = super().__new__(cls, segments)
        made.policy = policy
        return made

    policy: QByLoss

    def without(self, places: Sequence[bool]) -> SegmentsByLoss:
        return SegmentsByLoss(super().without(places), self.policy)


def cut_to_need(
    selection: Selection,
    segments: SegmentsByLoss,
    gradient: ChunkedVector,
    residual: Tensor | None,
) -> tuple[Selection, Segments]:
    """Return what of a finite selection is needed, and the segments with their k.

    Of each segment that has a selected element, the fewest of largest magnitude that have the
    energy which the policy asks for, but one at least. `selection`, in the order of `segments`, is
    of `gradient` plus `residual`.
    """
    values, kept, ks, start = selection.values.numpy(), [], [], 0
    for segment in segments:
        stop = start + segment.rows * segment.k
        if segment.k:
            total, alone = _energies(gradient, residual, segment.where)
            mine = _fewest(values[start:stop], segments.policy.needed(total, alone))
            kept.append(start + mine)
            ks.append(mine.size)
        else:
            ks.append(0)
        start = stop
    places = np.concatenate(kept) if kept else np.zeros(0, np.int64)
    cut = Segments(
        Segment(start=one.start, rows=one.rows, row_numel=one.row_numel, k=k)
        for one, k in zip(segments, ks, strict=True)
    )
    indices = torch.from_numpy(selection.indices.numpy()[places])
    return Selection(indices, torch.from_numpy(values[places]), True), cut


def _fewest(values: npt.NDArray[np.floating], needed: float) -> Indices:
    """Return, ascending, the places of the fewest values that have so much energy."""
    # the first ones of those that tie, as the selection has them
    order = np.argsort(-np.abs(values), kind="stable")
    energies = np.cumsum(np.square(values[order], dtype=np.float64))
    k = int(np.searchsorted(energies, needed)) + 1
    return np.sort(order[: min(k, values.size)])


def _energies(
    gradient: ChunkedVector, residual: Tensor | None, where: slice
) -> tuple[float, float]:
    """Return the squared norms of gradient + residual, and of the gradient."""
    mine = gradient[where]
    wide = accumulate_dtype(mine.dtype)
    total = alone = 0.0
    # block by block, or the sums would take as much room again as the gradient
    for start, stop in blocks(0, mine.numel(), BLOCK_NUMEL):
        part = mine[start:stop]
        part = part if part.dtype == wide else cast(part, wide)
        alone += _energy(part)
        if residual is not None:
            total += _energy(part + residual[where][start:stop])
    return (alone if residual is None else total), alone


def _energy(part: Tensor) -> float:
    if part.device.type == "cpu":
        # numpy, whose sum does not hang on how many threads there are
        return float(np.square(part.detach().numpy(), dtype=np.float64).sum())
    return float(part.double().square().sum())

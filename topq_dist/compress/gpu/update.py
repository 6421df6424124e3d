"""The end of a step on a device: the residual updated, the average written, if the step counts."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from topq_dist.compress.gpu.bounds import BoundTable
from topq_dist.compress.gpu.frames import Received, Written
from topq_dist.compress.gpu.kernels import update as kernels
from topq_dist.compress.gpu.memory import Scratch
from topq_dist.compress.gpu.select import KINDS, DeviceSelection
from topq_dist.compress.gpu.shape import FrameShape
from topq_dist.dtypes import FLOATS, accumulate_dtype

_BLOCK = 1024


class DeviceSelected(NamedTuple):
    """A vector of which the largest have been selected, and what its frame will be like.

    gradient, residual: what was selected from, unchanged; no residual without error feedback.
    bound: the table of the segments, and what they are clipped to; see write_frame.
    """

    gradient: Tensor
    residual: Tensor | None
    selection: DeviceSelection
    shape: FrameShape
    bound: tuple[BoundTable, float] | None


def finish(
    selected: DeviceSelected,
    written: Written,
    received: Received,
    report: Tensor,
    scratch: Scratch,
    *,
    divisor: int,
) -> None:
    """Update the residual, and make the gradient the mean of the frames, added in rank order.

    What the residual takes up and the mean are those of Residuals.apply and write_sum, to the bit.
    Where any rank has reported anything the residual stays as it is, and the gradient becomes NaN.
    """
    gradient, residual = selected.gradient, selected.residual
    dtype, numel = gradient.dtype, gradient.numel()
    kind, signed = KINDS[dtype], FLOATS[dtype].signed
    bits = gradient.detach().view(signed)
    ranks = received.heads.shape[0]
    wide = accumulate_dtype(dtype)
    total = gradient.detach() if wide == dtype else scratch.take(numel, wide)
    kept = bits if residual is None else residual.detach().view(FLOATS[residual.dtype].signed)
    everywhere = {
        "RANKS": 1 << (ranks - 1).bit_length(), "BLOCK": _BLOCK, "enable_fp_fusion": False,
    }  # fmt: skip
    if not numel:
        return
    whole = (-(-numel // _BLOCK),)
    kernels.take_up[whole](
        bits, kept, total, report, ranks, numel, _not_a_number(dtype), KIND=kind,
        HAS_RESIDUAL=residual is not None, HAS_TOTAL=wide != dtype, **everywhere,
    )  # fmt: skip
    k = received.indices.shape[1]
    some = (-(-k // _BLOCK),)
    if k and residual is not None and written.rest is not None:
        kernels.keep_rest[some](
            kept, selected.selection.indices, written.rest, written.plan,
            k, report, ranks, **everywhere,
        )  # fmt: skip
    if k:
        for rank in range(ranks):
            kernels.add_frame[some](
                total, received.indices[rank], received.values[rank], received.heads[rank],
                divisor, numel, report, ranks, KIND=KINDS[wide], **everywhere,
            )  # fmt: skip
    if wide != dtype:
        kernels.round_total[whole](
            bits, total, report, ranks, numel, KIND=kind, ALONE=ranks == 1, **everywhere
        )  # fmt: skip


@cache
def _not_a_number(dtype: torch.dtype) -> int:
    nan = torch.full((1,), torch.nan, dtype=dtype)
    return int(nan.view(FLOATS[dtype].signed))

"""Bounded values: no magnitude is sent that is many times the mean of those sent beside it.

What error feedback brings late arrives at once, as large as all the steps that it waited for; the
part above the bound waits on, in the residual.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from topq_dist.compress.kernels import bound_rows
from topq_dist.compress.sparsify.segments import Segment, Segments
from topq_dist.validation import check_number


def check_bound(bound: float | None, *, error_feedback: bool) -> float | None:
    """Return `bound`, or raise naming it unless it is None or a finite number above zero.

    Raises ValueError as well without error feedback, where what is clipped would be lost.
    """
    if bound is None:
        return None
    number = check_number("bound", bound)
    if number <= 0.0:
        raise ValueError(f"bound={bound!r}: expected None or a number above zero")
    if not error_feedback:
        raise ValueError(
            f"bound={bound!r} with error_feedback=False: expected None, since what is clipped "
            "would be lost"
        )
    return number


def bounded(values: Tensor, segments: Sequence[Segment], bound: float) -> Tensor:
    """Return the selected values, each row's clipped to `bound` times their mean magnitude.

    `values`, (k,) of fp32 or fp64, finite, on the CPU, are those of the rows of `segments` in
    order. A row of which half or more is selected stays as it is: nothing in it waits for long. The
    difference to `values` is exact: where a value is clipped, the limit is rounded to whatever
    makes it so.
    """
    _, rows, row_numel, k = Segments.of(segments).table.T
    rows = np.where(k > 0, rows, 0)
    k, row_numel = np.repeat(k, rows), np.repeat(row_numel, rows)
    if not k.size:
        return values
    wide = values.numpy()
    sent = np.empty_like(wide)
    bound_rows(wide, k, row_numel, bound, sent)
    return torch.from_numpy(sent)

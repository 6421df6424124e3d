"""Conversions to and from half precision, in the calling thread.

numpy has no bf16 and converts fp16 one number at a time, so torch does it; but a torch operation on
more than 32,768 elements wakes torch's own threads, and to wait for those costs more than the work.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SERIAL_NUMEL = 32_768


def cast(source: Tensor, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """Return 1-D `source` rounded to `dtype`, in `out` where that, of the same length, is given."""
    result = torch.empty(source.shape, dtype=dtype) if out is None else out
    if torch.get_num_threads() == 1:
        return result.copy_(source)
    for at in range(0, source.numel(), _SERIAL_NUMEL):
        result[at : at + _SERIAL_NUMEL].copy_(source[at : at + _SERIAL_NUMEL])
    return result

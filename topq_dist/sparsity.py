"""What top-Q means: k from q, the dq draw, the rows param_ndim makes of a tensor.

Torch only; imports nothing of ours. Source: rai_toolbox's TopQGradientOptimizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch


def check_param_ndim(value: Any) -> int | None:
    """Return `value` as int or None, or raise TypeError unless it is one of the two."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"param_ndim={value!r}: expected an integer or None, got {type(value).__name__}"
        )
    return int(value)


def k_from_q(q: float, numel: int) -> int:
    """Return k, how many of `numel` elements are top-Q: round((1 - q) * numel), half to even."""
    return round((1.0 - q) * numel)


def at_least_one(q: float, numel: int) -> int:
    """Return top-Q's k, but 1 where it is 0 and neither q is 1 nor the vector empty."""
    return max(k_from_q(q, numel), int(q < 1.0 and numel > 0))


def draw_q(q: float, dq: float, generator: torch.Generator) -> float:
    """Return q, or for dq > 0 one uniform draw from [q - dq, q + dq] cut to [0, 1].

    Takes exactly one torch.rand(1) from `generator` when dq > 0, and none when dq is 0 or so
    small that q - dq and q + dq are both q in float64.
    """
    q, dq = float(q), float(dq)
    low, high = max(0.0, q - dq), min(1.0, q + dq)
    if low == q == high:
        return q
    unit = torch.rand(1, generator=generator, device=generator.device)
    # the tensor arithmetic (fp32) is part of the seed's numbers: do not lift it into Python floats
    return float((high - low) * unit + low)


def batch_shape(shape: Sequence[int], param_ndim: int | None) -> tuple[int, ...]:
    """Return (N, d0, ...): a tensor of this shape seen as N sub-tensors of shape (d0, ...).

    None takes the whole tensor as one; a positive param_ndim is the number of trailing dimensions
    of a sub-tensor; a negative one is counted from the tensor's own ndim. Of a (3, 5, 2) tensor,
    0 makes (30, 1), 1 and -2 make (15, 2), 2 and -1 make (3, 5, 2), None makes (1, 3, 5, 2).

    Raises ValueError where |param_ndim| exceeds the number of dimensions.
    """
    ndim = len(shape)
    if param_ndim is not None and abs(param_ndim) > ndim:
        raise ValueError(
            f"param_ndim={param_ndim}: expected at most {ndim} in magnitude "
            f"for a parameter of shape {tuple(shape)}"
        )
    if param_ndim is None:
        param_ndim = ndim
    leading = ndim - param_ndim if param_ndim >= 0 else -param_ndim
    return math.prod(shape[:leading]), *(shape[leading:] or (1,))


def rows_lie_apart(shape: Sequence[int], strides: Sequence[int], param_ndim: int | None) -> bool:
    """Return whether a sub-tensor, as `batch_shape` makes them, is not one run of memory.

    strides: of a tensor without gaps.
    """
    n_rows, row_numel = row_shape(shape, param_ndim)
    numel, leading = n_rows * row_numel, 1
    for size, stride in zip(shape, strides, strict=True):
        if leading == n_rows or numel <= 1:
            return False
        if size > 1 and stride < row_numel:
            return True
        leading *= size
    return False


def row_shape(shape: Sequence[int], param_ndim: int | None) -> tuple[int, int]:
    """Return (N, n): a tensor of this shape is cut into N sub-tensors of n elements, in C order.

    The meaning of param_ndim, and the ValueError, are those of `batch_shape`.
    """
    n_rows, *sub_tensor = batch_shape(shape, param_ndim)
    return n_rows, math.prod(sub_tensor)

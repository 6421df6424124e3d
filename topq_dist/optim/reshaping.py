"""A parameter and its gradient in the shape that param_ndim asks for, written back afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from topq_dist.optim.groups import ParamGroup
from topq_dist.sparsity import batch_shape


@contextmanager
def as_batch(param: Tensor, group: ParamGroup, *, of: str) -> Iterator[Tensor]:
    """Yield the parameter and its gradient as (N, d0, ...) for work in place.

    Raises ValueError, naming the optimizer class `of`, where the gradient was replaced instead.
    """
    shape = batch_shape(param.shape, group["param_ndim"])
    batch = _reshaped(param, shape)
    gradient = None
    if param.grad is not None:
        gradient = batch.grad = _reshaped(param.grad, shape)
    yield batch
    if not _share_memory(batch.grad, gradient):
        raise ValueError(
            f"a transform of {of} replaced param.grad: expected the gradient to be changed in place"
        )
    _write_back(batch, param)
    if gradient is not None and param.grad is not None:
        _write_back(gradient, param.grad)


def check_dense(groups: list[ParamGroup]) -> None:
    """Raise TypeError, naming the parameter, unless all gradients are dense."""
    for number, group in enumerate(groups):
        for index, param in enumerate(group["params"]):
            if param.grad is not None and param.grad.layout is not torch.strided:
                name = f" ({group['param_names'][index]})" if "param_names" in group else ""
                raise TypeError(
                    f"parameter {index} of group {number}{name} has a gradient of layout "
                    f"{param.grad.layout}: expected a dense gradient"
                )


def _reshaped(tensor: Tensor, batch: tuple[int, ...]) -> Tensor:
    """Return a view of this shape where the strides allow, else a contiguous copy."""
    rows = tensor.detach().reshape(batch[0], math.prod(batch[1:]))
    return rows.view(batch)


def _share_memory(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _write_back(batch: Tensor, whole: Tensor) -> None:
    if not _share_memory(batch, whole):
        whole.copy_(batch.view(whole.shape))

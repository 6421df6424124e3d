"""The oracle: rai_toolbox's optimizers, and what the tests that ask them share."""

from __future__ import annotations

import functools
import importlib
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import rai_toolbox.optim
import torch
from torch import Tensor

from topq_dist import optim

OracleOptimizer: Any = rai_toolbox.optim.TopQGradientOptimizer
BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


@contextmanager
def oracle_warnings_ignored() -> Iterator[None]:
    """rai_toolbox reads Tensor.storage(), which newer torch deprecates: let that pass only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        yield


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors are equal to the bit, signs of zero and NaN payloads included."""
    a, b = a.detach().contiguous(), b.detach().contiguous()
    return a.dtype == b.dtype and torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


def untied_gradient(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Return at most 256 elements whose magnitudes all differ in the dtype, in random order."""
    numel = int(torch.Size(shape).numel())
    if numel > 256:
        raise ValueError(f"{numel} elements: expected at most 256, all that bfloat16 keeps apart")
    magnitude = torch.randperm(256, generator=generator)[:numel] + 1.0
    if dtype in (torch.float32, torch.float64):
        magnitude = magnitude + 0.9 * torch.rand(numel, generator=generator)
    sign = 1 - 2 * torch.randint(2, (numel,), generator=generator)
    exponent = torch.randint(-9, 1, (1,), generator=generator)
    return (sign * magnitude * 2.0**exponent).to(dtype).view(shape)


@functools.cache
def rai_class_on_our_base(name: str) -> Any:
    """Return one of rai_toolbox's optimizers, its code unchanged, derived from our base classes.

    Its modules are run a second time, as a package of another name that finds our bases where it
    looks for its own.
    """
    theirs = importlib.import_module("rai_toolbox.optim.optimizer")
    package: Any = types.ModuleType("rai_on_our_bases")
    package.__path__ = rai_toolbox.optim.__path__
    bases: Any = types.ModuleType("rai_on_our_bases.optimizer")
    bases.REQUIRED, bases.DatumParamGroup = theirs.REQUIRED, theirs.DatumParamGroup
    bases.ParamTransformingOptimizer = optim.ParamTransformingOptimizer
    bases.ChainedParamTransformingOptimizer = optim.ChainedParamTransformingOptimizer
    for module in (package, bases):
        sys.modules.setdefault(module.__name__, module)
    home = getattr(rai_toolbox.optim, name).__module__.rpartition(".")[2]
    return getattr(importlib.import_module(f"rai_on_our_bases.{home}"), name)

"""The scale of the loss, where it changes behind the hook's back."""

from __future__ import annotations

import math
import sys
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from topq_dist.compress.layout import Layout
from topq_dist.dtypes import local_part

# a scaler is in use from the first step on, and its frame is looked for in so many; a look costs
# as much as a small kernel, so that later ones are taken in one step of so many
_FIRST_STEPS = 10
_LOOKED_AT_STEPS = 16
_MOST_FRAMES = 12
_watching: weakref.WeakSet[LossScaleWatch] = weakref.WeakSet()
_installed: list[Any] = []


class LossScaleWatch:
    """Warns once where gradients come scaled, by a factor that changes.

    It compares the largest element of one small parameter's average, as the hook gave it, with that
    of the gradient which an optimizer steps on: what lies in between is a loss scale where it
    changes from step to step by exact powers of two, or where a GradScaler calls the step.
    """

    def __init__(self) -> None:
        self._layout: Layout | None = None
        # from the smallest parameter on, those of no element left out
        self._places: list[tuple[int, slice]] = []
        self._parameter: Tensor | None = None
        self._largest = self._factor = 0.0
        self._passes = 0
        _watching.add(self)
        if not _installed:
            # one for all and for good: to remove it while optimizers step would break their loop
            _installed.append(register_optimizer_step_pre_hook(_before_step))

    def saw(self, flat: Tensor, layout: Layout, parameters: Sequence[Tensor]) -> None:
        """Take note of a bucket's average, after which an optimizer may step."""
        self._passes += 1
        if self._passes > _FIRST_STEPS and (flat.is_cuda or self._passes % _LOOKED_AT_STEPS):
            # on a device every look is a wait
            self._parameter = None
            return
        if layout is not self._layout:
            self._layout = layout
            sized = [(place, one) for place, one in enumerate(layout.slices()) if _numel(one)]
            self._places = sorted(sized, key=lambda held: _numel(held[1]))
        self._parameter = None
        for place, where in self._places:
            self._largest = _largest(flat[where])
            if self._largest:
                self._parameter = parameters[place]
                return

    def look_at(self, optimizer: Optimizer) -> None:
        """Compare with what an optimizer is about to step on."""
        parameter = self._parameter
        if parameter is None or parameter.grad is None:
            return
        if self._passes <= _FIRST_STEPS and _is_scaled(optimizer) and _holds(optimizer, parameter):
            self._warn("a GradScaler is in use")
            return
        found = _largest(parameter.grad)
        factor = self._largest / found if found else 0.0
        if _is_power_of_two(factor) and _is_power_of_two(self._factor) and factor != self._factor:
            self._warn(f"they were divided by {self._factor:g} and now by {factor:g}")
            return
        if math.isfinite(factor) and factor:
            self._factor = factor

    def _warn(self, why: str) -> None:
        _watching.discard(self)
        warnings.warn(
            f"gradients come scaled, since {why} before the optimizer steps, and grad_scaler=None: "
            "after each change of scale the residuals are in the wrong unit, so give the hook "
            "grad_scaler= (for a scale of your own, a subclass whose get_scale() returns it)",
            stacklevel=4,
        )


def check_grad_scaler(grad_scaler: GradScaler | None) -> GradScaler | None:
    """Return `grad_scaler`, or raise TypeError unless it is None or a GradScaler."""
    if not isinstance(grad_scaler, GradScaler | None):
        raise TypeError(
            f"grad_scaler is a {type(grad_scaler).__name__}: expected a torch.amp.GradScaler"
        )
    return grad_scaler


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        # a look reads numbers and frames, which a traced step has not
        return
    for watch in list(_watching):
        watch.look_at(optimizer)


def _numel(where: slice) -> int:
    return int(where.stop - where.start)


def _largest(tensor: Tensor) -> float:
    tensor = local_part(tensor.detach())
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _is_power_of_two(factor: float) -> bool:
    return math.isfinite(factor) and factor > 0.0 and math.frexp(factor)[0] == 0.5


def _holds(optimizer: Optimizer, parameter: Tensor) -> bool:
    return any(one is parameter for group in optimizer.param_groups for one in group["params"])


def _is_scaled(optimizer: Optimizer) -> bool:
    """Return whether a GradScaler is calling this optimizer's step."""
    if getattr(optimizer, "grad_scale", None) is not None:
        # what it leaves to fused kernels
        return True
    frame, left = sys._getframe(1), _MOST_FRAMES
    while frame.f_back is not None and left:
        frame, left = frame.f_back, left - 1
        scaler = frame.f_locals.get("self") if "scaler" in frame.f_code.co_filename else None
        if isinstance(scaler, GradScaler):
            return scaler.is_enabled()
    return False

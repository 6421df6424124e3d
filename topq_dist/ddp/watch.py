"""What may change behind the hook's back: facts of the model, and the scale of the loss."""

from __future__ import annotations

import math
import sys
import warnings
import weakref
from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from topq_dist.compress.layout import Layout

_requires_grad = attrgetter("requires_grad")
# a scaler is in use from the first step on, and its frame is looked for in so many; a look costs
# as much as a small kernel, so that later ones are taken in one step of so many
_FIRST_STEPS = 10
_LOOKED_AT_STEPS = 16
_MOST_FRAMES = 12
_watching: weakref.WeakSet[LossScaleWatch] = weakref.WeakSet()
_installed: list[Any] = []


class ModelFacts:
    """What DistributedDataParallel goes by, as it is in the step that has begun.

    may_be_unused: DDP leaves a parameter's gradient alone where no rank has used it, so nothing
    may be sent for one whose own gradient is all zero. It is taken to be so where DDP is not known.

    ddp_model: None where a trainer holds it. names: of every parameter that it may exchange.
    """

    def __init__(
        self, ddp_model: DistributedDataParallel | None, names: Mapping[Tensor, str], scope: str
    ) -> None:
        # the model holds the hook, and must go with its last user
        self._ddp_model = None if ddp_model is None else weakref.ref(ddp_model)
        self._names = names
        self._scope = scope
        # frozen when DDP was made
        self._left_out: list[Tensor] | None = None
        if ddp_model is None and scope == "bucket":
            raise ValueError(
                "scope='bucket' for a model that is wrapped later: expected 'parameter', since "
                "parameters that no rank uses in a step cannot be told apart in a bucket"
            )
        self.may_be_unused = ddp_model is None or _may_be_unused(ddp_model, scope)

    def group(self) -> dist.ProcessGroup | None:
        """Return the process group that the model trains in; None where that is not known."""
        ddp_model = None if self._ddp_model is None else self._ddp_model()
        return None if ddp_model is None else ddp_model.process_group

    def begin_step(self) -> None:
        """Read what may have changed since the last step.

        Raises ValueError, naming it, for a trainable parameter that DDP does not exchange, and
        for a scope that cannot tell unused ones.
        """
        ddp_model = None if self._ddp_model is None else self._ddp_model()
        if ddp_model is not None:
            self.may_be_unused = _may_be_unused(ddp_model, self._scope)
        if self._left_out and any(map(_requires_grad, self._left_out)):
            names = [self._names[one] for one in self._left_out if one.requires_grad]
            raise ValueError(
                f"{', '.join(names)} was frozen when DistributedDataParallel was made, which does "
                "not average its gradient, and is trainable now: make DistributedDataParallel and "
                "the hook anew, or name it in _ddp_params_and_buffers_to_ignore of the model"
            )

    def end_step(self, exchanged: Collection[Tensor]) -> None:
        """Take note of the parameters that have been in buckets, all of them in the first pass."""
        if self._left_out is None:
            self._left_out = [one for one in self._names if one not in exchanged]


def _may_be_unused(ddp_model: DistributedDataParallel, scope: str) -> bool:
    """Return whether parameters may go unused; ValueError with a scope that cannot tell them."""
    may_be_unused = bool(ddp_model.find_unused_parameters)
    if may_be_unused and scope == "bucket":
        raise ValueError(
            "scope='bucket' with find_unused_parameters=True: expected 'parameter', since what is "
            "owed for a parameter that no rank uses in a step must wait"
        )
    return may_be_unused


class LossScaleWatch:
    """Warns once where gradients come scaled, by a factor that changes.

    It compares the largest element of one small parameter's average, as the hook gave it, with that
    of the gradient which an optimizer steps on: what lies in between is a loss scale where it
    changes from step to step by exact powers of two, or where a GradScaler calls the step.
    """

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._place, self._where = 0, slice(0)
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
        if self._passes > _FIRST_STEPS and self._passes % _LOOKED_AT_STEPS:
            self._parameter = None
            return
        if layout is not self._layout:
            slices = layout.slices()
            self._layout = layout
            self._place = min(range(len(slices)), key=lambda at: slices[at].stop - slices[at].start)
            self._where = slices[self._place]
        self._parameter = parameters[self._place]
        self._largest = _largest(flat[self._where])

    def look_at(self, optimizer: Optimizer) -> None:
        """Compare with what an optimizer is about to step on."""
        parameter = self._parameter
        if parameter is None or parameter.grad is None or not self._largest:
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


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for watch in list(_watching):
        watch.look_at(optimizer)


def _largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


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

"""Steps along a direction that has come in the gradients' place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from topq_dist.optim.groups import ParamGroup, decays_decoupled
from topq_dist.optim.momentum_rules import stepping
from topq_dist.optim.step_switch import StepSwitch


class DirectionSwitch(StepSwitch):
    """Has Adam or AdamW go along `grad` as it is, while it is `active`: p -= lr grad.

    AdamW's weight decay comes first, as ever; Adam's belongs into the direction, and is left out.
    The optimizer's own moments rest.
    """

    def __init__(self, optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
        super().__init__(check_adam(optimizer), parameters)

    def _values(self, group: ParamGroup) -> None:
        """Nothing: these parameters are moved once the step is over, its closure included."""

    def _stepped(self, optimizer: Optimizer) -> None:
        # a GradScaler leaves these to fused kernels, see torch.amp.GradScaler.step
        found_inf, scale = (getattr(optimizer, name, None) for name in ("found_inf", "grad_scale"))
        if found_inf is not None and bool(found_inf):
            return
        with torch.no_grad():
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if param in self._parameters and param.grad is not None:
                        direction = param.grad if scale is None else param.grad / scale
                        _move(param, direction, group, optimizer)


def check_adam(optimizer: Optimizer) -> Optimizer:
    """Return `stepping(optimizer)`; raises ValueError unless it is a plain Adam or AdamW."""
    inner = stepping(optimizer)
    if type(inner) not in (Adam, AdamW):
        raise ValueError(
            f"momentum='adam' with {type(inner).__name__}: expected torch's Adam or AdamW"
        )
    if any(group["amsgrad"] for group in optimizer.param_groups):
        raise ValueError("momentum='adam' with amsgrad=True: expected False")
    return inner


def _move(param: Tensor, direction: Tensor, group: ParamGroup, optimizer: Optimizer) -> None:
    lr = group["lr"]
    if group["weight_decay"] and decays_decoupled(group, optimizer):
        param.mul_(1 - lr * group["weight_decay"])
    if isinstance(lr, Tensor):
        param.sub_(direction * lr)
    else:
        param.sub_(direction, alpha=lr)

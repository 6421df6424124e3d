"""The direction of Adam by one rank's own gradients, before the selection, free of the rate.

Source: Kingma and Ba, "Adam" (ICLR 2015), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topq_dist.compress.layout import Layout
from topq_dist.compress.residual import Residuals
from topq_dist.dtypes import accumulate_dtype


@dataclass(frozen=True, kw_only=True)
class AdamOptions:
    """Adam's options for one name."""

    beta1: float
    beta2: float
    eps: float


class AdvancedMoments(NamedTuple):
    """The moments of a layout's names after a step that may still turn out void."""

    moments: tuple[Tensor, Tensor]
    advanced: tuple[Tensor, Tensor]
    steps: dict[str, int]


class AdamDirections:
    """Both moments by name, contiguous vectors per layout like the residuals, and steps by name."""

    def __init__(self) -> None:
        self._first = Residuals()
        self._second = Residuals()
        self._steps: dict[str, int] = {}

    def advance(
        self,
        flat: Tensor,
        layout: Layout,
        options: Sequence[AdamOptions | None],
        *,
        skip_unused: bool,
    ) -> AdvancedMoments:
        """Replace the gradients in `flat` by directions; the moments stay as they are.

        flat: 1-D of any float dtype, laid out as `layout`, with one AdamOptions a name; None
            leaves the gradient alone.
        skip_unused: a gradient that is all zero is that of a parameter out of use, which waits.
        """
        kind: dict[str, Any] = {"dtype": accumulate_dtype(flat.dtype), "device": flat.device}
        moments = self._first.flat(layout, **kind), self._second.flat(layout, **kind)
        first, second = (moment.clone() for moment in moments)
        steps: dict[str, int] = {}
        for name, where, option in zip(layout.names, layout.slices(), options, strict=True):
            gradient = flat[where].to(first.dtype)
            if option is None or (skip_unused and not bool(gradient.any())):
                continue
            step = steps[name] = self._steps.get(name, 0) + 1
            # the operations of torch's Adam, in its order
            first[where].lerp_(gradient, 1.0 - option.beta1)
            second[where].mul_(option.beta2).addcmul_(gradient, gradient, value=1.0 - option.beta2)
            spread = second[where].sqrt().div_((1.0 - option.beta2**step) ** 0.5).add_(option.eps)
            flat[where] = first[where].div(1.0 - option.beta1**step).div_(spread)
        return AdvancedMoments(moments, (first, second), steps)

    def commit(self, advanced: AdvancedMoments) -> None:
        """Make a step count."""
        for moment, after in zip(advanced.moments, advanced.advanced, strict=True):
            moment.copy_(after)
        self._steps.update(advanced.steps)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return copies of the first and the second moments and the steps, each by name."""
        return {
            "first": _of(self._first, self._steps),
            "second": _of(self._second, self._steps),
            "steps": dict(self._steps),
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace all by what `state_dict` returned; names it lacks start anew."""
        self._first.load_state_dict(state["first"])
        self._second.load_state_dict(state["second"])
        self._steps = dict(state["steps"])


def averaged_moments(
    states: Sequence[Mapping[str, Mapping[str, Any]]],
) -> dict[str, dict[str, Any]]:
    """Return what a rank takes over from several: the means of their moments, the most steps."""
    averaged: dict[str, dict[str, Any]] = {"first": {}, "second": {}, "steps": {}}
    for name in dict.fromkeys(name for state in states for name in state["steps"]):
        holders = [state for state in states if name in state["steps"]]
        for moment in ("first", "second"):
            held = [holder[moment][name].cpu() for holder in holders]
            averaged[moment][name] = torch.stack(held).mean(dim=0)
        averaged["steps"][name] = max(holder["steps"][name] for holder in holders)
    return averaged


def _of(moment: Residuals, steps: Mapping[str, int]) -> dict[str, Tensor]:
    return {name: held for name, held in moment.state_dict().items() if name in steps}

"""No step may end in numbers that are not finite: they would never leave the model again.

A step is undone by a copy of everything from before it, which costs more than the step. So it is
made only where the step could overflow: after a look at what goes into it, and now and then at what
is there already. In between, no optimizer of torch can come from the one bound to infinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from topq_dist.ps.model.flat import magnitude
from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.protocol.types import Push

# powers of the largest number of a dtype: of gradients and rates, whose products and squares are
# added up over so many steps, of state, which may hold such sums, and of what weight decay, which
# multiplies state, may make of it in as many
_CALM_INPUT = 0.25
_CALM_STATE = 0.4
_CALM_GROWTH = 0.1
_CALM_STEPS = 64
_CALM_DECAY = 16


class StepScale(NamedTuple):
    """The largest numbers that a step may multiply by.

    rate: with momentum taken out, which multiplies it. decay: weight decay.
    """

    rate: float
    decay: float

    @staticmethod
    def of(rates: Iterable[float], momenta: Iterable[float], decays: Iterable[float]) -> StepScale:
        """Return that of a step that may take any of these."""
        left = 1.0 - max(momenta, default=0.0)
        rate = max(rates, default=0.0) / left if left > 0.0 else math.inf
        return StepScale(rate, max(decays, default=0.0))


class NonFiniteStepError(Exception):
    """A step that was undone. workers: whose pushes were large enough for it, or all."""

    def __init__(self, workers: Sequence[str]) -> None:
        super().__init__(f"a step with the pushes of {', '.join(workers)} is not finite")
        self.workers = tuple(workers)


class StepGuard:
    """Says before a step whether it may overflow, and after one whether it did.

    groups: the optimizer's. tensors: returns what the next steps depend on, as views.
    """

    def __init__(
        self,
        spec: ModelSpec,
        groups: Iterable[Mapping[str, Any]],
        tensors: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        self._calm = min(_calm(vector.dtype, _CALM_INPUT) for vector in spec.vectors)
        self._growth = min(_calm(vector.dtype, _CALM_GROWTH) for vector in spec.vectors)
        smallest = max(torch.finfo(vector.dtype).smallest_normal for vector in spec.vectors)
        epsilons = [group["eps"] for group in groups if isinstance(group.get("eps"), float)]
        # Adam's 1e-8 is zero in fp16, where it divides by the root of a mean that may be zero
        self._divides_by_zero = min(epsilons, default=math.inf) < smallest
        self._tensors = tensors
        self._calm_steps_left = 0

    def is_calm(self, gradient: float, scale: StepScale) -> bool:
        """Return whether the next step cannot overflow.

        gradient: the largest of its mean gradient. scale: of the numbers that go into it.
        """
        if self._is_large(gradient, scale) or self._divides_by_zero:
            self._calm_steps_left = 0
            return False
        if not self._calm_steps_left:
            if not all(map(_is_calm, self._floats())):
                return False
            self._calm_steps_left = _CALM_STEPS
        self._calm_steps_left -= 1
        return True

    def is_finite(self) -> bool:
        """Return whether all that the next steps depend on is finite."""
        return all(math.isfinite(magnitude(tensor)) for tensor in self._floats())

    def error(self, pushes: Sequence[Push]) -> NonFiniteStepError:
        """Return the error of a step of these pushes, which was undone."""
        large = [push.worker for push in pushes if self._is_large(*_largest_of(push))]
        return NonFiniteStepError(large or [push.worker for push in pushes])

    def _is_large(self, gradient: float, scale: StepScale) -> bool:
        return (
            max(gradient, scale.rate) > self._calm
            # of state, it is a gradient; and a step multiplies state by 1 + rate * decay
            or _CALM_DECAY * scale.decay > self._growth
            or scale.rate * scale.decay > self._growth ** (1 / _CALM_STEPS) - 1
        )

    def _floats(self) -> Iterable[Tensor]:
        return (tensor for tensor in self._tensors().values() if tensor.is_floating_point())


def _largest_of(push: Push) -> tuple[float, StepScale]:
    gradient = max((magnitude(frame.values) for frame in push.frames), default=0.0)
    return gradient, StepScale.of(push.lr, push.momentum, push.weight_decay)


def _calm(dtype: torch.dtype, power: float) -> float:
    return math.pow(torch.finfo(dtype).max, power)


def _is_calm(tensor: Tensor) -> bool:
    # a single number counts steps, or is a product of betas
    bound = _calm(tensor.dtype, _CALM_STATE) if tensor.dim() else torch.finfo(tensor.dtype).max
    return magnitude(tensor) <= bound

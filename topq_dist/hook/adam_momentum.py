"""Adam on each rank: its own direction is sent, and the average of them stepped along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from topq_dist.compress.adam_direction import (
    AdamDirections,
    AdamOptions,
    AdvancedMoments,
    averaged_moments,
)
from topq_dist.compress.coherence import Coherence
from topq_dist.compress.compressor import Compressed, TopKCompressor
from topq_dist.compress.layout import Layout
from topq_dist.compress.residual import Residuals
from topq_dist.compress.sparsify.segments import Segment
from topq_dist.dtypes import local_part
from topq_dist.hook.momentum import MomentumName, Unit, unit_of
from topq_dist.hook.own_momentum import OwnMomentum, check_tensors
from topq_dist.optim.direction_step import DirectionSwitch, check_adam
from topq_dist.optim.groups import decays_decoupled
from topq_dist.optim.step_switch import StepSwitch


class AdamMomentum(OwnMomentum):
    """Each rank's own Adam direction (see `AdamDirections`), with error feedback on the update.

    Of the residual, a sum of directions, nothing can be sent with gradients: while all is sent it
    is put aside, and the optimizer steps with moments of its own.

    summed_ranks: of how many ranks' gradients a bucket is the sum when it is compressed.
    """

    name: ClassVar[MomentumName] = "adam"
    unit: ClassVar[Unit] = "direction"

    def __init__(
        self,
        names: Mapping[Tensor, str],
        residuals: Residuals,
        optimizer: Optimizer,
        *,
        summed_ranks: int,
    ) -> None:
        super().__init__(names, residuals, optimizer)
        self._inner = check_adam(optimizer)
        self._summed_ranks = summed_ranks
        self._directions = AdamDirections()
        self._advanced: list[AdvancedMoments] = []
        self._aside: dict[str, Tensor] = {}

    def compress(
        self,
        compressor: TopKCompressor,
        flat: Tensor,
        layout: Layout,
        parameters: Sequence[Tensor],
        segments: Sequence[Segment],
        *,
        parts: int,
    ) -> Compressed:
        if not self._is_sparse:
            return compressor.compress(flat, layout, segments, parts=parts)
        if self._summed_ranks > 1:
            flat.div_(self._summed_ranks)
        options = [self._options_of(parameter) for parameter in parameters]
        for parameter, gradient in zip(parameters, layout.tensors(flat), strict=True):
            self._add_weight_decay(parameter, gradient)
        advanced = self._directions.advance(flat, layout, options, skip_unused=self._skip_unused)
        if self._summed_ranks > 1:
            flat.mul_(self._summed_ranks)
        self._advanced.append(advanced)
        return compressor.compress(flat, layout, segments, parts=parts)

    def end_step(self, coherence: Coherence) -> None:
        for advanced in self._advanced:
            self._directions.commit(advanced)
        self._advanced.clear()

    def begin_step(self, *, sparse: bool, sent_fraction: float, skip_unused: bool) -> None:
        # of a step that was void, or broken off
        self._advanced.clear()
        super().begin_step(sparse=sparse, sent_fraction=sent_fraction, skip_unused=skip_unused)

    def _takes_over(self, sent_fraction: float) -> bool:
        # directions and gradients cannot wait in one sum
        return True

    def _options_of(self, parameter: Tensor) -> AdamOptions | None:
        group = self._groups.get(parameter)
        if group is None:
            return None
        beta1, beta2 = map(float, group["betas"])
        return AdamOptions(beta1=beta1, beta2=beta2, eps=float(group["eps"]))

    def _add_weight_decay(self, parameter: Tensor, gradient: Tensor) -> None:
        group = self._groups.get(parameter)
        if group is None or (self._skip_unused and not bool(gradient.any())):
            return
        if group["maximize"]:
            gradient.neg_()
        if group["weight_decay"] and not decays_decoupled(group, self._inner):
            gradient.add_(local_part(parameter.detach()), alpha=group["weight_decay"])

    def _change_unit(self, *, to_own: bool) -> None:
        if to_own:
            self._residuals.load_state_dict(self._aside)
            self._aside = {}
        else:
            self._aside = self._residuals.state_dict()
            self._residuals.load_state_dict({})

    def _make_switch(self, optimizer: Optimizer) -> StepSwitch:
        return DirectionSwitch(optimizer, self._names)

    def detach(self) -> None:
        super().detach()
        self._aside = {}

    def residuals(self) -> dict[str, Tensor]:
        if self._is_sparse or self._optimizer is None:
            return super().residuals()
        return {name: residual.clone() for name, residual in self._aside.items()}

    def load_residuals(self, residuals: Mapping[str, Tensor]) -> None:
        if self._is_sparse or self._optimizer is None:
            super().load_residuals(residuals)
            return
        super().load_residuals({})
        self._aside = {name: residual.clone() for name, residual in residuals.items()}

    def state_dict(self) -> dict[str, Any]:
        if self._optimizer is None:
            return super().state_dict()
        # put aside, residuals are what they were
        return super().state_dict() | {"unit": self.unit} | self._directions.state_dict()

    def check_state(self, state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        if unit_of(state) != self.unit:
            if state["residuals"]:
                raise ValueError(
                    "state has residuals of gradients: expected those of a hook with "
                    "momentum='adam', which are of another kind"
                )
            return
        momentum = state["momentum"]
        for key in ("first", "second"):
            check_tensors(key, momentum.get(key), shapes)
        steps = momentum.get("steps")
        if not isinstance(steps, Mapping):
            raise TypeError(f"state has steps={steps!r}: expected what state_dict returned")
        if not steps.keys() == momentum["first"].keys() == momentum["second"].keys():
            raise ValueError("state has moments and steps of different names: expected the same")
        for name, step in steps.items():
            if isinstance(step, bool) or not isinstance(step, int) or step < 1:
                raise ValueError(f"state has steps[{name!r}]={step!r}: expected a number above 0")

    def load_states(
        self,
        mine: Sequence[Mapping[str, Any]],
        every: Sequence[Mapping[str, Any]],
        alike: Mapping[str, Any],
    ) -> None:
        held = [state["momentum"] for state in every if unit_of(state) == self.unit]
        self._directions.load_state_dict(
            held[0] if len(held) == len(mine) == 1 else averaged_moments(held)
        )

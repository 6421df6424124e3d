"""Momentum correction: on the rank, before the selection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from topq_dist.compress.codec.frame import decode_frame
from topq_dist.compress.coherence import Coherence
from topq_dist.compress.compressor import Compressed, TopKCompressor
from topq_dist.compress.layout import Layout
from topq_dist.compress.partition import BlockCyclicPartition
from topq_dist.compress.residual import Residuals, merged
from topq_dist.compress.sparsify.segments import Segment
from topq_dist.compress.velocity import Advanced, Decay, Velocity
from topq_dist.hook.momentum import MomentumName, Unit, unit_of
from topq_dist.hook.own_momentum import OwnMomentum, check_tensors
from topq_dist.optim.momentum_rules import MomentumSwitch, stepping
from topq_dist.optim.step_switch import StepSwitch


class CorrectedMomentum(OwnMomentum):
    """Momentum before the selection, masked where it was sent (DGC, see `Velocity`).

    The residual is a sum of velocities, each gradient in it as often as its momentum makes it
    count; it goes back to one of gradients, and the velocities are dropped, when all is sent.
    """

    name: ClassVar[MomentumName] = "corrected"
    unit: ClassVar[Unit] = "velocity"

    def __init__(
        self,
        names: Mapping[Tensor, str],
        residuals: Residuals,
        optimizer: Optimizer,
        *,
        mask_velocity: bool,
    ) -> None:
        super().__init__(names, residuals, optimizer)
        self._mask_velocity = mask_velocity
        self._velocity = Velocity()
        self._advanced: list[tuple[Advanced, Compressed]] = []
        self._is_summed = isinstance(stepping(optimizer), SGD)
        if not self._is_summed and not all("betas" in group for group in optimizer.param_groups):
            raise ValueError(
                f"momentum='corrected' with {type(stepping(optimizer)).__name__}: expected SGD, or "
                "one with betas like Adam"
            )

    def begin_step(self, *, sparse: bool, sent_fraction: float, skip_unused: bool) -> None:
        # of a step that was void, or broken off
        self._advanced.clear()
        super().begin_step(sparse=sparse, sent_fraction=sent_fraction, skip_unused=skip_unused)

    def _takes_over(self, sent_fraction: float) -> bool:
        # without the mask this is the optimizer's own momentum where everything is sent
        return not self._mask_velocity or super()._takes_over(sent_fraction)

    def settings(self) -> str:
        return f"{super().settings()} mask_velocity={self._mask_velocity}"

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
        decays = [self._decay_of(parameter) for parameter in parameters]
        advanced = self._velocity.advance(flat, layout, decays, skip_unused=self._skip_unused)
        compressed = compressor.compress(flat, layout, segments, parts=parts)
        self._advanced.append((advanced, compressed))
        return compressed

    def end_step(self, coherence: Coherence) -> None:
        for advanced, compressed in self._advanced:
            numel = advanced.velocity.numel()
            sent = _sent_indices(compressed, numel) if self._mask_velocity else None
            self._velocity.commit(advanced, sent)
        self._advanced.clear()

    def _decay_of(self, parameter: Tensor) -> Decay | None:
        group = self._groups.get(parameter)
        if group is None:
            # another optimizer's, or none's
            return None
        if self._is_summed:
            momentum = float(group["momentum"])
            if not momentum < 1.0:
                raise ValueError(f"momentum={momentum!r}: expected a number below 1")
            return Decay(
                momentum=momentum,
                share=1.0 - float(group["dampening"]) if momentum else 1.0,
                nesterov=bool(group["nesterov"]),
            )
        beta1 = float(group["betas"][0])
        return Decay(momentum=beta1, share=1.0 - beta1, first_share=1.0 - beta1)

    def _change_unit(self, *, to_own: bool) -> None:
        self._velocity.clear()
        factors = {}
        for param, name in self._names.items():
            decay = self._decay_of(param)
            # how often a gradient counts that goes through the momentum; an average is one
            times = 1.0
            if self._is_summed and decay is not None and decay.share > 0.0:
                times = decay.share / (1.0 - decay.momentum)
            factors[name] = times if to_own else 1.0 / times
        if any(factor != 1.0 for factor in factors.values()):
            held = self._residuals.state_dict()
            self._residuals.load_state_dict({n: held[n] * factors.get(n, 1.0) for n in held})

    def _make_switch(self, optimizer: Optimizer) -> StepSwitch:
        return MomentumSwitch(optimizer, self._names, scale_rate=False)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"velocity": self._velocity.state_dict()}

    def check_state(self, state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        if unit_of(state) != self.unit:
            super().check_state(state, shapes)
            return
        check_tensors("velocity", state["momentum"].get("velocity"), shapes)

    def load_states(
        self,
        mine: Sequence[Mapping[str, Any]],
        every: Sequence[Mapping[str, Any]],
        alike: Mapping[str, Any],
    ) -> None:
        self._is_sparse = bool(every) and unit_of(every[0]) == self.unit
        velocities = [s["momentum"]["velocity"] for s in mine] if self._is_sparse else []
        self._velocity.load_state_dict(merged(velocities))


def _sent_indices(compressed: Compressed, numel: int) -> Tensor:
    if compressed.own is not None:
        return compressed.own.indices
    partition = BlockCyclicPartition(numel=numel, count=len(compressed.frames))
    return torch.cat(
        [
            partition.to_global(part, decode_frame(frame, numel=partition.numel_of(part)).indices)
            for part, frame in enumerate(compressed.frames)
        ]
    )

"""Error feedback in the place of the optimizer's momentum."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from topq_dist.compress.coherence import Coherence, CoherenceMean, measure_coherence
from topq_dist.compress.compressor import Compressed, TopKCompressor
from topq_dist.compress.layout import Layout
from topq_dist.compress.residual import Residuals
from topq_dist.compress.residual_rates import check_rates
from topq_dist.compress.sparsify.segments import Segment
from topq_dist.hook.momentum import MomentumName, SwitchedMomentum
from topq_dist.hook.optimizer_rates import OptimizerRates
from topq_dist.optim.momentum_rules import MomentumSwitch, divides_by_mean_square


class FeedbackMomentum(SwitchedMomentum):
    """Error feedback in the place of the optimizer's momentum, while the exchange is sparse.

    keep_rate: apply what was kept back at the rate of the step it came from (ResidualRates). half:
        the names of the parameters whose gradients are of float16.
    adapt_rate: multiply the rate of an optimizer that divides by the root of a mean of squares by
        what the coherence of gradients and residuals says (see compress/coherence.py).
    """

    name: ClassVar[MomentumName] = "feedback"

    def __init__(
        self,
        names: Mapping[Tensor, str],
        residuals: Residuals,
        optimizer: Optimizer,
        *,
        keep_rate: bool,
        adapt_rate: bool,
        half: Collection[str] = (),
    ) -> None:
        super().__init__(names, residuals, optimizer)
        self._followed = OptimizerRates(names, residuals, half) if keep_rate else None
        self._adapts_rate = adapt_rate and divides_by_mean_square(optimizer)
        self._mean = CoherenceMean()
        self._sent_fraction = 1.0
        self._measures = False

    @property
    def needs_coherence(self) -> bool:  # type: ignore[override]
        return self._adapts_rate

    def settings(self) -> str:
        # the rate follows from the mean, so that ranks must have the same
        mean = f" coherence={self._mean.state()}" if self._adapts_rate else ""
        kept = self._followed is not None
        return f"{super().settings()} keep_rate={kept} adapt_rate={self._adapts_rate}{mean}"

    def begin_step(self, *, sparse: bool, sent_fraction: float, skip_unused: bool) -> None:
        super().begin_step(sparse=sparse, sent_fraction=sent_fraction, skip_unused=skip_unused)
        self._sent_fraction = sent_fraction
        takes_over = sparse and self._takes_over(sent_fraction)
        if self._followed is not None:
            self._followed.begin_step(self._optimizer if sparse else None)
        self._measures = self._adapts_rate and takes_over and self._optimizer is not None

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
        compressed = compressor.compress(flat, layout, segments, parts=parts)
        if not self._measures:
            return compressed
        residual = self._residuals.home(layout)
        return replace(compressed, coherence=measure_coherence(flat, residual, layout))

    def end_step(self, coherence: Coherence) -> None:
        if not self._measures or not isinstance(self._switch, MomentumSwitch):
            return
        self._mean.add(coherence)
        self._switch.rate_factor = self._mean.rate_factor(self._sent_fraction)

    def detach(self) -> None:
        super().detach()
        if self._followed is not None:
            # nobody follows them any more
            self._followed.load_state({})

    def state_dict(self) -> dict[str, Any]:
        rates = {} if self._followed is None else self._followed.state()
        return {**super().state_dict(), "coherence": self._mean.state(), "rates": rates}

    def check_state(self, state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().check_state(state, shapes)
        self._mean.check_state(_coherence_in(state))
        if self._followed is not None:
            check_rates(_rates_in(state))

    def load_states(
        self,
        mine: Sequence[Mapping[str, Any]],
        every: Sequence[Mapping[str, Any]],
        alike: Mapping[str, Any],
    ) -> None:
        self._mean.load_state(_coherence_in(alike))
        if self._followed is not None:
            self._followed.load_state(_rates_in(alike))

    def _make_switch(self, optimizer: Optimizer) -> MomentumSwitch:
        return MomentumSwitch(optimizer, self._names)


def _coherence_in(state: Mapping[str, Any]) -> Any:
    # older states and those of other methods have none
    return state.get("momentum", {}).get("coherence", list(Coherence()))


def _rates_in(state: Mapping[str, Any]) -> Any:
    return state.get("momentum", {}).get("rates", {})

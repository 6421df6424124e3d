"""Where the momentum of a run with error feedback is: in the residual, on the rank, or as it was.

Error feedback acts as a momentum, since what is not sent arrives with later gradients. A momentum
behind it delays everything once more, and breaks training; so the optimizer's is taken out while
the exchange is sparse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.optim import Optimizer

from topq_dist.compress.coherence import Coherence
from topq_dist.compress.compressor import Compressed, TopKCompressor
from topq_dist.compress.layout import Layout
from topq_dist.compress.residual import Residuals
from topq_dist.compress.sparsify.segments import Segment
from topq_dist.optim.momentum_rules import takes_momentum_out
from topq_dist.optim.step_switch import StepSwitch

MomentumName = Literal["feedback", "corrected", "adam", "optimizer"]
# what a residual is a sum of
Unit = Literal["gradient", "velocity", "direction"]


class Momentum:
    """The momentum that the optimizer has, and what the other methods do otherwise.

    names: the parameters of the hook, and their names. residuals: the hook's own.
    """

    name: ClassVar[MomentumName] = "optimizer"
    # whether `end_step` goes by the sum of what all ranks have measured
    needs_coherence = False

    def __init__(self, names: Mapping[Tensor, str], residuals: Residuals) -> None:
        self._names = names
        self._residuals = residuals

    def settings(self) -> str:
        """Return the settings as text, the same on ranks that work alike."""
        return f"momentum={self.name}"

    def attach(self) -> None:
        """Get ready to act on the optimizer, whose next step may hold the first backward pass."""

    def begin_step(self, *, sparse: bool, sent_fraction: float, skip_unused: bool) -> None:
        """Take note of a step: whether its exchange is a sparse one, and how much is sent.

        skip_unused: a gradient that is all zero is that of a parameter out of use.
        """

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
        """Return the frames of a bucket; `flat` stays what is compressed until the step's end."""
        return compressor.compress(flat, layout, segments, parts=parts)

    def end_step(self, coherence: Coherence) -> None:
        """Take note of a step that counts on every rank, with the sum of what they measured."""

    def detach(self) -> None:
        """Hand the optimizer back for good."""

    def residuals(self) -> dict[str, Tensor]:
        """Return a copy of the residuals by name."""
        return self._residuals.state_dict()

    def load_residuals(self, residuals: Mapping[str, Tensor]) -> None:
        """Replace the residuals by these, which are in the unit of the state last loaded."""
        self._residuals.load_state_dict(residuals)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the residuals."""
        return {"method": self.name, "unit": "gradient"}

    def check_state(self, state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise TypeError or ValueError unless this can be resumed from a hook's whole state."""
        unit = unit_of(state)
        if unit != "gradient" and state["residuals"]:
            raise ValueError(
                f"state has residuals of momentum={state['momentum'].get('method')!r}: expected "
                f"those of a hook with momentum={self.name!r}"
            )

    def load_states(
        self,
        mine: Sequence[Mapping[str, Any]],
        every: Sequence[Mapping[str, Any]],
        alike: Mapping[str, Any],
    ) -> None:
        """Take up states that `check_state` has let pass: those of this rank's part, and all.

        every: none on a rank that keeps nothing. alike: any of them, for what all ranks have alike.
        """


class SwitchedMomentum(Momentum):
    """What the other methods share: sparse steps that see another momentum."""

    def __init__(
        self, names: Mapping[Tensor, str], residuals: Residuals, optimizer: Optimizer
    ) -> None:
        super().__init__(names, residuals)
        # None once it has been handed back
        self._optimizer: Optimizer | None = optimizer
        self._switch: StepSwitch | None = None

    def attach(self) -> None:
        if self._optimizer is not None:
            self._switch = self._make_switch(self._optimizer)
            # gradients that come without the hook are the optimizer's own affair
            self._switch.for_one_step = True

    def begin_step(self, *, sparse: bool, sent_fraction: float, skip_unused: bool) -> None:
        if self._switch is not None:
            self._switch.active = sparse and self._takes_over(sent_fraction)

    def _takes_over(self, sent_fraction: float) -> bool:
        """Return whether a sparse step is this method's, or leaves the optimizer's momentum."""
        return takes_momentum_out(sent_fraction)

    def detach(self) -> None:
        self._optimizer = None
        if self._switch is not None:
            self._switch.detach()

    def _make_switch(self, optimizer: Optimizer) -> StepSwitch:
        """Return what shows the optimizer's steps this method's options."""
        raise NotImplementedError


def unit_of(state: Mapping[str, Any]) -> Unit:
    """Return what the residuals of a hook's state are sums of; older states do not say."""
    momentum = state.get("momentum", {"unit": "gradient"})
    if not isinstance(momentum, Mapping):
        raise TypeError(f"state has momentum={momentum!r}: expected what state_dict returned")
    unit: Unit = momentum.get("unit", "gradient")
    return unit

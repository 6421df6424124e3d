"""Where the momentum of a run with error feedback is: in the residual, on the rank, or as it was.

Error feedback acts as a momentum, since what is not sent arrives with later gradients. A momentum
behind it delays everything once more, and breaks training; so the optimizer's is taken out while
the exchange is sparse.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from torch import Tensor
from torch.optim import Optimizer

from topq_dist.compress.compressor import Compressed, FlatCompressor
from topq_dist.compress.cuts import Cut
from topq_dist.compress.feedback import Layout
from topq_dist.optim.momentum import MomentumSwitch, has_momentum, momentum_rule, stepping
from topq_dist.optim.step_switch import StepSwitch

MomentumName = Literal["feedback", "optimizer"]

_log = logging.getLogger(__name__)
# where more is sent there is little that could act as a momentum
SPARSE_BELOW = 0.5


def takes_momentum_out(sent_fraction: float) -> bool:
    """Return whether a step that sends this fraction of its gradients does without momentum."""
    return sent_fraction < SPARSE_BELOW


class Momentum:
    """The momentum that the optimizer has, and what the other methods have in common."""

    name: MomentumName = "optimizer"

    def settings(self) -> str:
        """Return the settings as text, the same on ranks that work alike."""
        return f"momentum={self.name}"

    def begin_step(self, *, sparse: bool) -> None:
        """Take note of a step whose exchange is sparse, or sends everything."""

    def compress(
        self,
        compressor: FlatCompressor,
        flat: Tensor,
        layout: Layout,
        cuts: Sequence[Cut],
        *,
        parts: int,
    ) -> Compressed:
        """Return the frames of a bucket; `flat` stays what is compressed until they are kept."""
        return compressor.compress(flat, layout, cuts, parts=parts)

    def detach(self) -> None:
        """Hand the optimizer back for good."""


class FeedbackMomentum(Momentum):
    """Error feedback in the place of the optimizer's momentum, while the exchange is sparse."""

    name: MomentumName = "feedback"

    def __init__(self, optimizer: Optimizer, parameters: Mapping[Tensor, str]) -> None:
        self._optimizer: Optimizer | None = optimizer
        self._parameters = parameters
        self._switch: StepSwitch | None = None

    def begin_step(self, *, sparse: bool) -> None:
        if self._switch is None and self._optimizer is not None:
            # not before the hook is in use, or a hook that was refused would leave its mark
            self._switch = self._make_switch(self._optimizer)
        if self._switch is not None:
            self._switch.active = sparse

    def detach(self) -> None:
        self._optimizer = None
        if self._switch is not None:
            self._switch.detach()

    def _make_switch(self, optimizer: Optimizer) -> StepSwitch:
        return MomentumSwitch(optimizer, self._parameters)


def make_momentum(
    momentum: MomentumName | None,
    optimizer: Optimizer | None,
    names: Mapping[Tensor, str],
    *,
    error_feedback: bool,
) -> Momentum:
    """Return a hook's method; raises TypeError or ValueError where the parts do not fit."""
    if momentum is not None and momentum not in get_args(MomentumName):
        known = ", ".join(get_args(MomentumName))
        raise ValueError(f"momentum={momentum!r}: expected one of {known}, or None")
    if optimizer is not None:
        check_optimizer(optimizer, names)
    if momentum not in (None, "optimizer"):
        if optimizer is None:
            raise ValueError(
                f"momentum={momentum!r} without an optimizer: expected the optimizer that steps, "
                "whose momentum is meant"
            )
        if not error_feedback:
            raise ValueError(
                f"momentum={momentum!r} with error_feedback=False: expected True, since it stands "
                "in for the momentum, or momentum='optimizer'"
            )
    if optimizer is None or not error_feedback:
        return Momentum()
    if momentum == "optimizer":
        _warn_of_momentum(optimizer, names)
        return Momentum()
    if momentum_rule(optimizer) is None:
        _warn_of_unknown(optimizer)
    else:
        # a momentum that cannot be taken out is an error now
        has_momentum(optimizer, names)
    return FeedbackMomentum(optimizer, names)


def check_optimizer(optimizer: Optimizer, names: Mapping[Tensor, str]) -> None:
    """Raise TypeError or ValueError unless this is an optimizer of some of these parameters."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}: expected a torch optimizer, or None"
        )
    if not any(param in names for group in optimizer.param_groups for param in group["params"]):
        raise ValueError(
            f"optimizer holds none of the {len(names)} trainable parameters of the model: expected "
            "the optimizer that steps them"
        )


def advise(rank: int) -> None:
    """Say what to set by hand, on one rank, where a hook has no optimizer to set it on."""
    if rank == 0:
        _log.warning(
            "error feedback acts as a momentum, and a momentum behind it breaks training: give "
            "the hook optimizer=..., which takes it out; or set it by hand, for SGD momentum=0 and "
            "the rate divided by 1 - momentum, for Adam and its kind beta1=0; or say "
            "momentum='optimizer'"
        )


def _warn_of_momentum(optimizer: Optimizer, names: Mapping[Tensor, str]) -> None:
    if has_momentum(optimizer, names):
        warnings.warn(
            f"momentum='optimizer': {type(stepping(optimizer)).__name__} has a momentum, and error "
            "feedback acts as another; momentum='feedback' does without the first",
            stacklevel=5,
        )


def _warn_of_unknown(optimizer: Optimizer) -> None:
    warnings.warn(
        f"nothing is known of the momentum of {type(stepping(optimizer)).__name__}, which is left "
        "as it is behind error feedback, itself a momentum: say how to take it out with "
        "topq_dist.register_momentum_rule, or momentum='optimizer' to leave it",
        stacklevel=5,
    )

"""The hook's momentum by name, and what is said where it cannot be what it should."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import get_args

from torch import Tensor
from torch.optim import Optimizer

from topq_dist.compress.residual import Residuals
from topq_dist.hook.adam_momentum import AdamMomentum
from topq_dist.hook.corrected_momentum import CorrectedMomentum
from topq_dist.hook.feedback_momentum import FeedbackMomentum
from topq_dist.hook.momentum import Momentum, MomentumName
from topq_dist.optim.momentum_rules import has_momentum, momentum_rule, stepping
from topq_dist.validation import warn_caller

_log = logging.getLogger(__name__)


def check_momentum(
    momentum: MomentumName | None,
    optimizer: Optimizer | None,
    names: Mapping[Tensor, str],
    *,
    error_feedback: bool,
    mask_velocity: bool,
    keep_rate: bool,
    adapt_rate: bool,
) -> MomentumName:
    """Return the method meant; raises TypeError or ValueError where the knobs do not fit."""
    if momentum is not None and momentum not in get_args(MomentumName):
        known = ", ".join(get_args(MomentumName))
        raise ValueError(f"momentum={momentum!r}: expected one of {known}, or None")
    if not isinstance(mask_velocity, bool):
        raise TypeError(f"mask_velocity={mask_velocity!r}: expected True or False")
    if not isinstance(keep_rate, bool):
        raise TypeError(f"keep_rate={keep_rate!r}: expected True or False")
    if not isinstance(adapt_rate, bool):
        raise TypeError(f"adapt_rate={adapt_rate!r}: expected True or False")
    if not mask_velocity and momentum != "corrected":
        raise ValueError(
            f"mask_velocity=False with momentum={momentum!r}: expected 'corrected', which alone "
            "has a velocity"
        )
    if optimizer is not None:
        _check_optimizer(optimizer, names)
    if momentum is None:
        return "feedback" if optimizer is not None and error_feedback else "optimizer"
    if momentum != "optimizer" and optimizer is None:
        raise ValueError(
            f"momentum={momentum!r} without an optimizer: expected the one that steps the model, "
            "whose momentum is meant"
        )
    if momentum != "optimizer" and not error_feedback:
        raise ValueError(
            f"momentum={momentum!r} with error_feedback=False: expected True, or "
            "momentum='optimizer'"
        )
    return momentum


def make_momentum(
    momentum: MomentumName,
    optimizer: Optimizer | None,
    names: Mapping[Tensor, str],
    residuals: Residuals,
    *,
    mask_velocity: bool,
    keep_rate: bool,
    adapt_rate: bool,
    summed_ranks: int,
    half: Collection[str],
) -> Momentum:
    """Return the method that `check_momentum` has returned.

    names: of the parameters, those included that are frozen and may be freed. half: of those whose
    gradients are of float16. Raises ValueError
    where it cannot go with this optimizer. Warns, once, of an optimizer that nothing is known of.
    """
    if momentum == "optimizer" or optimizer is None:
        return Momentum(names, residuals)
    _say_whose_stay(optimizer, names)
    if momentum == "adam":
        return AdamMomentum(names, residuals, optimizer, summed_ranks=summed_ranks)
    if momentum_rule(optimizer) is None:
        if momentum == "corrected":
            raise ValueError(
                f"momentum='corrected' with {type(stepping(optimizer)).__name__}, whose own "
                "momentum would act as well, since nothing is known of it: say how to take it out "
                "with topq_dist.register_momentum_rule"
            )
        warn_caller(
            f"nothing is known of the momentum of {type(stepping(optimizer)).__name__}, which is "
            "left as it is behind error feedback, itself a momentum: say how to take it out with "
            "topq_dist.register_momentum_rule, or momentum='optimizer' to leave it"
        )
    # one that cannot be taken out is an error now, not in the first step
    has_momentum(optimizer, names)
    if momentum == "corrected":
        return CorrectedMomentum(names, residuals, optimizer, mask_velocity=mask_velocity)
    return FeedbackMomentum(
        names, residuals, optimizer, keep_rate=keep_rate, adapt_rate=adapt_rate, half=half
    )


def advise(optimizer: Optimizer | None, names: Mapping[Tensor, str], *, rank: int) -> None:
    """Say what would train better, where a hook with error feedback leaves the momentum."""
    if optimizer is not None:
        if has_momentum(optimizer, names):
            warn_caller(
                f"momentum='optimizer': {type(stepping(optimizer)).__name__} has a momentum, and "
                "error feedback acts as another; momentum='feedback' does without the first"
            )
    elif rank == 0:
        _log.warning(
            "error feedback acts as a momentum, and one behind it breaks training: give the hook "
            "optimizer=..., which takes its momentum out; or set it by hand, for SGD momentum=0 "
            "and the rate divided by 1 - momentum, for Adam and its kind beta1=0"
        )


def _check_optimizer(optimizer: Optimizer, names: Mapping[Tensor, str]) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}: expected a torch optimizer, or None"
        )
    if not any(param in names for group in optimizer.param_groups for param in group["params"]):
        raise ValueError(
            f"optimizer holds none of the {len(names)} trainable parameters of the model: expected "
            "the optimizer that steps them"
        )


def _say_whose_stay(optimizer: Optimizer, names: Mapping[Tensor, str]) -> None:
    held = {param for group in optimizer.param_groups for param in group["params"]}
    trainable = [param for param in names if param.requires_grad]
    left = [names[param] for param in trainable if param not in held]
    if left:
        _log.warning(
            "the hook's optimizer holds %d of %d trainable parameters: of the one that steps the "
            "others, %s first, the momentum stays as it is",
            len(trainable) - len(left),
            len(trainable),
            left[0],
        )

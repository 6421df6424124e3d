"""Stages of a bucket before it is exchanged, and what a wrapper of models says of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch.distributed as dist
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from topq_dist.compress.compressor import TopKCompressor
from topq_dist.compress.layout import Layout, OutOfRows
from topq_dist.hook.loss_scale import LossScaleWatch
from topq_dist.hook.momentum import Momentum
from topq_dist.hook.sparsity_policy import SparsityPolicy

# None is the gradient's own
_LOSSLESS = (None, "fp32", "fp64")
# a bucket's layout, and what is out of rows for it
Laid: TypeAlias = tuple[Layout, Sequence[OutOfRows]]


class Layouts(Protocol):
    """How buckets are laid out; `seen` are the parameters that have been in one."""

    seen: set[Tensor]

    def of(self, parameters: Sequence[Tensor]) -> Laid:
        """Return the layout of a bucket of these parameters, and what is out of rows for it."""


class ModelFacts(Protocol):
    """A wrapped model as it is in the step that has begun.

    may_be_unused: nothing may be sent for a parameter whose own gradient is all zero.
    """

    may_be_unused: bool

    def group(self) -> dist.ProcessGroup | None:
        """Return the process group that the model trains in; None where that is not known."""

    def begin_step(self) -> None:
        """Read what may have changed since the last step; raises where that cannot be."""

    def settings(self) -> str:
        """Return what must be the same on every rank in the step that has begun."""

    def end_step(self, exchanged: Collection[Tensor]) -> None:
        """Take note of the parameters that have been in buckets."""


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Everything that a bucket goes through before it is exchanged.

    scales_half: whether there are gradients of float16 with a loss scale. They are unscaled into
        fp32, since they may be too small for float16 without it.
    """

    model: ModelFacts
    sparsity: SparsityPolicy
    compressor: TopKCompressor
    momentum: Momentum
    clip_norm: float | None
    grad_scaler: GradScaler | None
    scales_half: bool
    scale_watch: LossScaleWatch | None

    def sends_all(self) -> bool:
        """Return whether steps leave nothing out and round nothing."""
        value_format = self.compressor.value_format
        return self.sparsity.sent_fraction() == 1.0 and value_format in _LOSSLESS

    def settings(self) -> str:
        """Return this step's settings, the same text on ranks that work alike."""
        clip = f"clip_norm={self.clip_norm} grad_scaler={self.grad_scaler is not None}"
        clip += f" {self.model.settings()}"
        compressed = f"{self.compressor.settings()} {clip} {self.momentum.settings()}"
        return f"{self.sparsity.settings()}\n{compressed}"

"""Facts of a model in DistributedDataParallel that may change between steps."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping
from operator import attrgetter

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

_requires_grad = attrgetter("requires_grad")


class ModelFacts:
    """What DistributedDataParallel goes by, as it is in the step that has begun.

    may_be_unused: DDP leaves a parameter's gradient alone where no rank has used it, so nothing
    may be sent for one whose own gradient is all zero. It is taken to be so where DDP is not known.

    ddp_model: None where a trainer holds it. names: of every parameter that it may exchange.
    """

    def __init__(
        self, ddp_model: DistributedDataParallel | None, names: Mapping[Tensor, str], scope: str
    ) -> None:
        # the model holds the hook, and must go with its last user
        self._ddp_model = None if ddp_model is None else weakref.ref(ddp_model)
        self._names = names
        self._scope = scope
        # frozen when DDP was made
        self._left_out: list[Tensor] | None = None
        if ddp_model is None and scope == "bucket":
            raise ValueError(
                "scope='bucket' for a model that is wrapped later: expected 'parameter', since "
                "parameters that no rank uses in a step cannot be told apart in a bucket"
            )
        self.may_be_unused = ddp_model is None or _may_be_unused(ddp_model, scope)

    def group(self) -> dist.ProcessGroup | None:
        """Return the process group that the model trains in; None where that is not known."""
        ddp_model = None if self._ddp_model is None else self._ddp_model()
        return None if ddp_model is None else ddp_model.process_group

    def begin_step(self) -> None:
        """Read what may have changed since the last step.

        Raises ValueError, naming it, for a trainable parameter that DDP does not exchange, and
        for a scope that cannot tell unused ones.
        """
        ddp_model = None if self._ddp_model is None else self._ddp_model()
        if ddp_model is not None:
            self.may_be_unused = _may_be_unused(ddp_model, self._scope)
        if self._left_out and any(map(_requires_grad, self._left_out)):
            names = [self._names[one] for one in self._left_out if one.requires_grad]
            # as torch compares them
            listed = [name if "." in name else f".{name}" for name in names]
            raise ValueError(
                f"{', '.join(names)} was frozen when DistributedDataParallel was made, which does "
                "not average its gradient, and is trainable now: make DistributedDataParallel and "
                "the hook anew, or have _ddp_params_and_buffers_to_ignore of the model hold "
                f"{', '.join(listed)}"
            )

    def settings(self) -> str:
        """Return what must be the same on every rank in the step that has begun."""
        return f"may_be_unused={self.may_be_unused}"

    def end_step(self, exchanged: Collection[Tensor]) -> None:
        """Take note of the parameters that have been in buckets, all of them in the first pass."""
        if self._left_out is None:
            self._left_out = [one for one in self._names if one not in exchanged]


def _may_be_unused(ddp_model: DistributedDataParallel, scope: str) -> bool:
    """Return whether parameters may go unused; ValueError with a scope that cannot tell them."""
    may_be_unused = bool(ddp_model.find_unused_parameters)
    if may_be_unused and scope == "bucket":
        raise ValueError(
            "scope='bucket' with find_unused_parameters=True: expected 'parameter', since what is "
            "owed for a parameter that no rank uses in a step must wait"
        )
    return may_be_unused

"""What the methods share whose momentum is each rank's own, and acts before the selection.

They write what is to be sent into the bucket, and what they remember waits for the end of the step,
which is known to count on all ranks then, as the update of the residual does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from topq_dist.compress.residual import Residuals, check_residual
from topq_dist.hook.momentum import SwitchedMomentum, Unit
from topq_dist.optim.groups import ParamGroup


class OwnMomentum(SwitchedMomentum):
    """What these methods share: a residual in a unit of their own while the exchange is sparse."""

    unit: ClassVar[Unit]

    def __init__(
        self, names: Mapping[Tensor, str], residuals: Residuals, optimizer: Optimizer
    ) -> None:
        super().__init__(names, residuals, optimizer)
        self._skip_unused = False
        self._is_sparse = False
        self._groups: dict[Tensor, ParamGroup] = {}

    def begin_step(self, *, sparse: bool, sent_fraction: float, skip_unused: bool) -> None:
        super().begin_step(sparse=sparse, sent_fraction=sent_fraction, skip_unused=skip_unused)
        self._skip_unused = skip_unused
        if self._optimizer is None:
            return
        sparse = sparse and self._takes_over(sent_fraction)
        self._groups = {
            param: group for group in self._optimizer.param_groups for param in group["params"]
        }
        if sparse != self._is_sparse:
            self._change_unit(to_own=sparse)
            self._is_sparse = sparse

    def detach(self) -> None:
        if self._is_sparse:
            self._change_unit(to_own=False)
            self._is_sparse = False
        super().detach()

    def _change_unit(self, *, to_own: bool) -> None:
        """Bring the residuals into this method's own unit, or into that of gradients."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        unit = self.unit if self._is_sparse else "gradient"
        return super().state_dict() | {"unit": unit}


def check_tensors(key: str, tensors: object, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise TypeError or ValueError, naming it, unless this is a state's tensor by name."""
    if not isinstance(tensors, Mapping):
        raise TypeError(f"state has {key}={tensors!r}: expected what state_dict returned")
    for name, tensor in tensors.items():
        check_residual(name, tensor)
        if tuple(tensor.shape) != shapes.get(name):
            raise ValueError(
                f"state has {key} of {name!r} with shape {tuple(tensor.shape)}: expected "
                f"{shapes.get(name, 'no such parameter in this model')}"
            )

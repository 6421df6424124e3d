"""A model as local steps see it: what of it is exchanged under which name, and what it must be."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, get_process_group_ranks
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from topq_dist.dtypes import FLOATS, check_plain
from topq_dist.local.fragment import local_part
from topq_dist.module_names import plain_name, unwrapped


class LocalModel(NamedTuple):
    """The trainable parameters of `module` by name; `node` is the group that DDP trains it in."""

    module: nn.Module
    parameters: dict[str, Tensor]
    node: ProcessGroup | None

    def buffers(self) -> dict[str, Tensor]:
        """Return the buffers by name, asked for anew: modules put others in their place."""
        return {plain_name(name): buffer for name, buffer in self.module.named_buffers()}

    def text(self) -> str:
        """Return what must be the same on every rank, a line for each tensor."""
        return "\n".join(
            f"{name} {tuple(local_part(tensor).shape)} {tensor.dtype}"
            for name, tensor in (*self.parameters.items(), *self.buffers().items())
        )


def local_model(model: nn.Module, optimizer: Optimizer) -> LocalModel:
    """Return what of `model` is exchanged.

    Raises TypeError or ValueError, naming it, for a parameter that cannot be, a model without any,
    and an optimizer that steps parameters of another.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: expected a torch.nn.Module")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}: expected the torch.optim.Optimizer that "
            "takes the inner steps"
        )
    node, module = None, unwrapped(model)
    if isinstance(module, DistributedDataParallel):
        node, module = module.process_group, unwrapped(module.module)
    parameters: dict[str, Tensor] = {
        plain_name(name): parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    if not parameters:
        raise ValueError("model has no trainable parameter: expected one at least")
    for name, parameter in parameters.items():
        _check_parameter(name, parameter)
    devices = {local_part(parameter).device for parameter in parameters.values()}
    if len(devices) > 1:
        raise ValueError(
            f"model has parameters on {', '.join(sorted(map(str, devices)))}: expected one device, "
            "so make a LocalTopQ for each part, with an optimizer of its own"
        )
    _check_optimizer(optimizer, module)
    return LocalModel(module, parameters, node)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter; the CPU for what has none."""
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if first is None else local_part(first).device


def check_group(group: ProcessGroup, node: ProcessGroup | None) -> None:
    """Raise ValueError where DistributedDataParallel has the ranks of `group` in step already."""
    if node is None or group.size() == 1:
        return
    if get_process_group_ranks(node) == get_process_group_ranks(group):
        raise ValueError(
            "process_group has the ranks that DistributedDataParallel averages gradients among at "
            "every step: expected the group across the nodes, and DistributedDataParallel with "
            "process_group= those of one node"
        )


def _check_parameter(name: str, parameter: Tensor) -> None:
    if is_lazy(parameter):
        raise TypeError(f"{name} has no shape yet: run the model once before it is given here")
    check_plain(name, local_part(parameter))
    if parameter.dtype not in FLOATS:
        known = ", ".join(str(dtype) for dtype in FLOATS)
        raise TypeError(
            f"{name} has dtype {parameter.dtype}: expected a real floating-point parameter, "
            f"one of {known}"
        )


def _check_optimizer(optimizer: Optimizer, module: nn.Module) -> None:
    known = set(module.parameters())
    strangers = [
        tuple(parameter.shape)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter not in known
    ]
    if strangers:
        raise ValueError(
            f"optimizer has parameters of shapes {strangers[:5]}, which the model has not: "
            "expected the optimizer of this model, since what it steps beside is never exchanged"
        )

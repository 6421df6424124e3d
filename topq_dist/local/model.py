"""A model as local steps see it: what of it is exchanged under which name, and what it must be."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from topq_dist.dtypes import FLOATS, check_plain, is_plain
from topq_dist.local.fragment import local_part
from topq_dist.module_names import bare_name, check_not_fsdp1, unwrapped


class LocalModel(NamedTuple):
    """The parameters of `module` by name, those that were trainable and those that were not."""

    module: nn.Module
    parameters: dict[str, Tensor]
    frozen: dict[str, Tensor]

    def buffers(self) -> dict[str, Tensor]:
        """Return the buffers by name, asked for anew: modules put others in their place."""
        buffers = self.module.named_buffers()
        return _with_numbers({bare_name(name): buffer for name, buffer in buffers})

    def trainable(self) -> dict[str, Tensor]:
        """Return what trains by now, by name: exchanged or not."""
        named = self.module.named_parameters()
        return {bare_name(name): one for name, one in named if one.requires_grad}

    def tensors(self) -> dict[str, Tensor]:
        """Return all that the first rank has and the others take, by name."""
        return {**self.parameters, **self.frozen, **self.buffers()}

    def text(self) -> str:
        """Return what must be the same on every rank, a line for each tensor."""
        return _text(self.tensors())

    def text_of_buffers(self) -> str:
        """Return what of it modules may have changed by now."""
        return _text(self.buffers())

    def text_of_shard(self) -> str:
        """Return what those must have alike that hold the same shards, a line for each tensor."""
        return "\n".join(
            f"{name} {tuple(tensor.to_local().shape)}, at {tensor.device_mesh.get_coordinate()} of "
            "its mesh"
            for name, tensor in self.tensors().items()
            if isinstance(tensor, DTensor)
        )


def _text(tensors: dict[str, Tensor]) -> str:
    return "\n".join(
        f"{name} {tuple(tensor.shape)} {tensor.dtype} {getattr(tensor, 'placements', '')}"
        for name, tensor in tensors.items()
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
    check_not_fsdp1(model)
    module = unwrapped(model)
    if isinstance(module, DistributedDataParallel):
        module = unwrapped(module.module)
    parameters: dict[str, Tensor] = {}
    frozen: dict[str, Tensor] = {}
    for name, one in module.named_parameters():
        _check_lazy(name, one)
        (parameters if one.requires_grad else frozen)[bare_name(name)] = one
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
    return LocalModel(module, parameters, _with_numbers(frozen))


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter; the CPU for what has none."""
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if first is None else local_part(first).device


def _with_numbers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return those that can be sent: classes of their own, as of quantized weights, stay put."""
    return {name: one for name, one in tensors.items() if is_plain(local_part(one))}


def _check_lazy(name: str, parameter: Tensor) -> None:
    if is_lazy(parameter):
        raise TypeError(f"{name} has no shape yet: run the model once before it is given here")


def _check_parameter(name: str, parameter: Tensor) -> None:
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

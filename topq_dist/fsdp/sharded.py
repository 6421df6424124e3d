"""The sharded parameters of a model: their names, the modules they are of, and where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from operator import itemgetter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from topq_dist.dtypes import local_part
from topq_dist.fsdp.torch_side import own_parameters, sharded_modules
from topq_dist.module_names import bare_name


def sharded_names(root: FSDPModule) -> dict[Tensor, str]:
    """Return the name of each parameter that fully_shard has sharded, those frozen included.

    What torch.compile and checkpoint_wrapper add to names is left out, so that a state fits the
    model with them or without.
    """
    names: dict[Tensor, str] = {}
    for name, parameter in root.named_parameters():  # type: ignore[attr-defined]
        if isinstance(parameter, DTensor):
            names[parameter] = bare_name(name)
    return names


class ShardedModules:
    """The modules that fully_shard was applied to, each with the parameters of its own."""

    def __init__(self, root: FSDPModule, names: Mapping[Tensor, str]) -> None:
        self._own = {
            module: [one for one in own_parameters(module) if one in names]
            for module in sharded_modules(root)
        }

    def all(self) -> list[tuple[FSDPModule, list[Tensor]]]:
        """Return each module with its parameters."""
        return list(self._own.items())

    def trainable(self) -> list[tuple[FSDPModule, list[Tensor]]]:
        """Return modules with those of their parameters that train, and are not empty here.

        Where all are empty, one of them: such a rank must go along with the others.
        """
        found = [
            (module, one) for module, held in self._own.items() for one in held if one.requires_grad
        ]
        filled = [(module, one) for module, one in found if local_part(one).numel()] or found[:1]
        return [
            (module, [one for _, one in group])
            for module, group in groupby(filled, key=itemgetter(0))
        ]


def shard_device(parameter: Tensor) -> torch.device:
    """Return the device on which a parameter is trained: that of its mesh, this process's own."""
    assert isinstance(parameter, DTensor)  # noqa: S101 - for mypy: the names hold no others
    kind = parameter.device_mesh.device_type
    if kind == "cpu":
        return torch.device(kind)
    return torch.device(kind, torch.accelerator.current_device_index())


def shard_group(parameter: Tensor) -> dist.ProcessGroup:
    """Return the ranks among which a parameter is sharded."""
    assert isinstance(parameter, DTensor)  # noqa: S101 - for mypy: the names hold no others
    return parameter.device_mesh.get_group()

"""What a rank that comes into an elastic run takes from one that is in it, besides the rounds'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from topq_dist.exchange.handed_state import check_travels, from_texts, to_texts
from topq_dist.local.model import LocalModel
from topq_dist.module_names import unwrapped


def check_can_be_elastic(module: nn.Module, model: LocalModel, optimizer: Optimizer) -> None:
    """Raise ValueError for a model that other processes hold parts of, or keep in step.

    Raises TypeError for an optimizer whose state is not of numbers, texts and tensors.
    """
    if isinstance(unwrapped(module), DistributedDataParallel):
        raise ValueError(
            "elastic with a model in DistributedDataParallel: expected a bare module, since the "
            "ranks of a node would each decide for themselves who is lost"
        )
    shards = [name for name, one in model.parameters.items() if isinstance(one, DTensor)]
    if shards:
        raise ValueError(
            f"elastic with {shards[0]}, which is in shards: expected whole parameters on each "
            "rank, since with a rank its shards are lost"
        )
    check_travels(optimizer.state_dict())


def handed_from(model: LocalModel, optimizer: Optimizer) -> dict[str, Any]:
    """Return what is not exchanged and the optimizer's state, as texts; no tensor is copied."""
    return {
        "frozen": {name: parameter.detach() for name, parameter in model.frozen.items()},
        "buffers": {name: buffer.detach() for name, buffer in model.buffers().items()},
        "optimizer": to_texts(optimizer.state_dict()),
    }


def take_handed(state: Mapping[str, Any], model: LocalModel, optimizer: Optimizer) -> None:
    """Take up what `handed_from` has returned on a peer."""
    for key, held in (("frozen", model.frozen), ("buffers", model.buffers())):
        for name, tensor in held.items():
            tensor.detach().copy_(state[key][name])
    optimizer.load_state_dict(from_texts(state["optimizer"], optimizer.state_dict()))

"""What a rank that comes into an elastic run takes from one that is in it, besides the rounds'."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from topq_dist.exchange.gathered_states import outline_of
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
    try:
        json.dumps(outline_of(handed_from(model, optimizer), []))
    except TypeError as error:
        raise TypeError(
            f"optimizer has a state that cannot be handed to another rank ({error}): expected "
            "numbers, texts and tensors"
        ) from error


def handed_from(model: LocalModel, optimizer: Optimizer) -> dict[str, Any]:
    """Return buffers by name, not copied, and the optimizer's state with text keys alone."""
    state = optimizer.state_dict()
    return {
        "buffers": {name: buffer.detach() for name, buffer in model.buffers().items()},
        "optimizer": [[key, value] for key, value in state["state"].items()],
        "groups": state["param_groups"],
    }


def take_handed(state: Mapping[str, Any], model: LocalModel, optimizer: Optimizer) -> None:
    """Take up what `handed_from` has returned on a peer."""
    with torch.no_grad():
        for name, buffer in model.buffers().items():
            buffer.copy_(state["buffers"][name])
    groups = [
        # texts have no tuples
        {
            key: tuple(value) if isinstance(mine.get(key), tuple) else value
            for key, value in one.items()
        }
        for mine, one in zip(optimizer.param_groups, state["groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": dict(state["optimizer"]), "param_groups": groups})

"""The states of all ranks on rank 0: what is no tensor as JSON, the tensors as their bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from topq_dist.exchange.agreement import gather_texts
from topq_dist.exchange.collectives import CommContext

# in the place of a tensor stands a dict of its dtype and shape under a key that is no name
_TENSOR = ""


def gather_states(
    state: Mapping[str, Any], context: CommContext, *, version: int
) -> dict[str, Any]:
    """Return the states of all ranks, under "ranks" in rank order, on rank 0; elsewhere nothing.

    A collective. state: dicts with text keys, lists, tensors, numbers, texts and None. version: of
    what is returned.
    """
    tensors: list[Tensor] = []
    outline = json.dumps(outline_of(state, tensors))
    outlines = gather_texts(outline, group=context.group, device=context.device)
    if context.rank > 0:
        first = dist.get_global_rank(context.group, 0)
        for tensor in tensors:
            dist.send(bytes_of(tensor).to(context.device), first, group=context.group)
        return {}
    others = [
        filled(json.loads(text), partial(_received, context=context, rank=rank))
        for rank, text in enumerate(outlines[1:], start=1)
    ]
    return {"version": version, "ranks": [dict(state), *others]}


def outline_of(value: Any, tensors: list[Tensor]) -> Any:
    """Return what JSON can hold of a value, having appended its tensors in order."""
    if isinstance(value, Tensor):
        if value.numel():
            tensors.append(value)
        return {_TENSOR: [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    if isinstance(value, Mapping):
        return {key: outline_of(one, tensors) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [outline_of(one, tensors) for one in value]
    return value


def filled(outline: Any, receive: Callable[[int], Tensor]) -> Any:
    """Return the value of which `outline` is; `receive` returns so many bytes of the next tensor.

    It is asked for tensors in order, and never for one that is empty.
    """
    if isinstance(outline, list):
        return [filled(one, receive) for one in outline]
    if not isinstance(outline, dict):
        return outline
    if _TENSOR not in outline:
        return {key: filled(one, receive) for key, one in outline.items()}
    name, shape = outline[_TENSOR]
    dtype: torch.dtype = getattr(torch, name)
    payload = torch.empty(0, dtype=torch.uint8)
    if prod(shape):
        payload = receive(prod(shape) * dtype.itemsize)
    return payload.cpu().view(dtype).view(shape)


def _received(numel_bytes: int, *, context: CommContext, rank: int) -> Tensor:
    payload = torch.empty(numel_bytes, dtype=torch.uint8, device=context.device)
    dist.recv(payload, dist.get_global_rank(context.group, rank), group=context.group)
    return payload


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, 1-D uint8 on the CPU."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)

"""The states of all ranks on rank 0: what is no tensor as JSON, the tensors as their bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    outline = json.dumps(_outline(state, tensors))
    outlines = gather_texts(outline, group=context.group, device=context.device)
    if context.rank > 0:
        first = dist.get_global_rank(context.group, 0)
        for tensor in tensors:
            dist.send(_bytes_of(tensor).to(context.device), first, group=context.group)
        return {}
    others = [
        _filled(json.loads(text), rank, context) for rank, text in enumerate(outlines[1:], start=1)
    ]
    return {"version": version, "ranks": [dict(state), *others]}


def _outline(value: Any, tensors: list[Tensor]) -> Any:
    """Return what JSON can hold of a value, having appended its tensors in order."""
    if isinstance(value, Tensor):
        if value.numel():
            tensors.append(value)
        return {_TENSOR: [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    if isinstance(value, Mapping):
        return {key: _outline(one, tensors) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_outline(one, tensors) for one in value]
    return value


def _filled(outline: Any, rank: int, context: CommContext) -> Any:
    """Return the value of which `outline` is, with the tensors as `rank` sends them."""
    if isinstance(outline, list):
        return [_filled(one, rank, context) for one in outline]
    if not isinstance(outline, dict):
        return outline
    if _TENSOR not in outline:
        return {key: _filled(one, rank, context) for key, one in outline.items()}
    name, shape = outline[_TENSOR]
    dtype: torch.dtype = getattr(torch, name)
    payload = torch.empty(prod(shape) * dtype.itemsize, dtype=torch.uint8, device=context.device)
    if payload.numel():
        source = dist.get_global_rank(context.group, rank)
        dist.recv(payload, source, group=context.group)
    return payload.cpu().view(dtype).view(shape)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)

"""A rank's state on its way to all others, as nothing but texts, numbers and tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from topq_dist.exchange.agreement import gather_texts
from topq_dist.exchange.collectives import CommContext
from topq_dist.exchange.gathered_states import bytes_of, filled, outline_of


def hand_state(state: Mapping[str, Any] | None, context: CommContext, *, source: int) -> Any:
    """Return the state of rank `source` on every other; a collective.

    state: what `gather_states` takes, on the source; others give None. Nothing is changed before
    all of it is there.
    """
    tensors: list[Tensor] = []
    outline = "{}" if state is None else json.dumps(outline_of(state, tensors))
    outlines = gather_texts(outline, group=context.group, device=context.device)
    sender = dist.get_global_rank(context.group, source)
    if state is not None:
        for tensor in tensors:
            dist.broadcast(bytes_of(tensor).to(context.device), sender, group=context.group)
        return state

    def receive(numel_bytes: int) -> Tensor:
        payload = torch.empty(numel_bytes, dtype=torch.uint8, device=context.device)
        dist.broadcast(payload, sender, group=context.group)
        return payload

    return filled(json.loads(outlines[source]), receive)


def check_travels(optimizer_state: Mapping[str, Any]) -> None:
    """Raise TypeError unless an optimizer's state_dict is numbers, texts and tensors."""
    try:
        json.dumps(outline_of(to_texts(optimizer_state), []))
    except TypeError as error:
        raise TypeError(
            f"optimizer has a state that cannot be handed to another rank ({error}): expected "
            "numbers, texts and tensors"
        ) from error


def to_texts(optimizer_state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state_dict with text keys alone; tensors are not copied."""
    state, groups = optimizer_state["state"], optimizer_state["param_groups"]
    return {"state": [[key, value] for key, value in state.items()], "groups": groups}


def from_texts(texts: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state_dict of which `to_texts` has made this; `like`: one of that optimizer."""
    groups = [dict(group) for group in texts["groups"]]
    for mine, group in zip(like["param_groups"], groups, strict=True):
        # texts have no tuples
        group |= {key: tuple(group[key]) for key in group if isinstance(mine.get(key), tuple)}
    return {"state": dict(texts["state"]), "param_groups": groups}

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

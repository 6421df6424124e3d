"""What the first rank of a group has, on every rank: parameters at the start, and buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from topq_dist.dtypes import local_part
from topq_dist.exchange.collectives import CommContext, member

_NOTHING = torch.empty(0, dtype=torch.uint8)
# of those that travel together, beside which there is a copy of them
_RUN_BYTES = 1 << 28


class FirstRanks:
    """Tensors of any dtypes and shapes on their way from the group's first rank to all others.

    A collective that all ranks launch by making one, with tensors alike, and end with `receive`.
    """

    def __init__(self, tensors: Sequence[Tensor], context: CommContext) -> None:
        parts_here = [local_part(tensor).detach() for tensor in tensors]
        self._tensors = [tensor for tensor in parts_here if tensor.numel()]
        self._context = context
        # of shards all may be empty, on all ranks that hold the same ones
        parts = [_bytes_of(one).to(context.device) for one in self._tensors]
        self._payload = torch.cat(parts) if parts else _NOTHING
        sender = dist.get_global_rank(context.group, 0)
        self._work: dist.Work | None = None
        if parts:
            self._work = member(
                dist.broadcast(self._payload, sender, group=context.group, async_op=True)
            )
        sent_bytes = self._payload.numel() * (context.rank == 0)
        context.meter.add(sent_bytes=sent_bytes, wire_bytes=sent_bytes)

    def receive(self, commit: Callable[[], None] | None = None) -> None:
        """Wait, and write what has come into the tensors, once `commit` returns."""
        if self._work is None:
            return
        with self._context.meter.timed("wait_s"):
            self._work.wait()
        if commit is not None:
            commit()
        if self._context.rank == 0:
            return
        sizes = [one.numel() * one.element_size() for one in self._tensors]
        for tensor, part in zip(self._tensors, torch.split(self._payload, sizes), strict=True):
            # cloned, since a view needs what is aligned
            tensor.copy_(part.to(tensor.device).clone().view(tensor.dtype).view(tensor.shape))


def give_all(tensors: Iterable[Tensor], context: CommContext) -> None:
    """Have every rank take the first one's tensors, of any dtypes and shapes; a collective."""
    run: list[Tensor] = []
    run_bytes = 0
    for tensor in tensors:
        run.append(tensor)
        run_bytes += local_part(tensor).nbytes
        if run_bytes >= _RUN_BYTES:
            FirstRanks(run, context).receive()
            run, run_bytes = [], 0
    FirstRanks(run, context).receive()


def _bytes_of(tensor: Tensor) -> Tensor:
    # what is conjugated or negated on the way to a reader is not so in memory
    resolved = tensor.resolve_conj().resolve_neg()
    return resolved.contiguous().view(-1).view(torch.uint8)

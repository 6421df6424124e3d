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

    payload: on the first rank, what `payload` was of one that is to be launched once more.
    """

    def __init__(
        self, tensors: Sequence[Tensor], context: CommContext, *, payload: Tensor | None = None
    ) -> None:
        self._tensors = _filled(tensors)
        self._context = context
        # of shards all may be empty, on all ranks that hold the same ones
        parts = [_bytes_of(one).to(context.device) for one in self._tensors]
        self._payload = torch.cat(parts) if parts else _NOTHING
        if payload is not None and context.rank == 0:
            self._payload.copy_(payload)
        sender = dist.get_global_rank(context.group, 0)
        self._work: dist.Work | None = None
        if parts:
            self._work = member(
                dist.broadcast(self._payload, sender, group=context.group, async_op=True)
            )
        sent_bytes = self._payload.numel() * (context.rank == 0)
        context.meter.add(sent_bytes=sent_bytes, wire_bytes=sent_bytes)

    @property
    def payload(self) -> Tensor:
        """A copy of what is on its way, 1-D uint8; on other ranks than the first nothing."""
        return self._payload.clone() if self._context.rank == 0 else _NOTHING

    def receive(
        self, commit: Callable[[], None] | None = None, *, into: Sequence[Tensor] | None = None
    ) -> None:
        """Wait, and write what has come into the tensors, once `commit` returns.

        into: what is in the place of these by now, where that may be others of their shapes.
        """
        if self._work is None:
            return
        with self._context.meter.timed("wait_s"):
            self._work.wait()
        if commit is not None:
            commit()
        if self._context.rank == 0:
            return
        sizes = [one.nbytes for one in self._tensors]
        tensors = _filled(self._tensors if into is None else into)
        if _kinds(tensors) != _kinds(self._tensors):
            tensors = self._tensors
        for tensor, part in zip(tensors, torch.split(self._payload, sizes), strict=True):
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


def nbytes_of(tensors: Iterable[Tensor]) -> int:
    """Return how many bytes of tensors are in this process."""
    return sum(local_part(tensor).nbytes for tensor in tensors)


def _filled(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return what of tensors is in this process, but for those of which nothing is."""
    here = [local_part(tensor).detach() for tensor in tensors]
    return [tensor for tensor in here if tensor.numel()]


def _kinds(tensors: Iterable[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(one.shape, one.dtype) for one in tensors]


def _bytes_of(tensor: Tensor) -> Tensor:
    # what is conjugated or negated on the way to a reader is not so in memory
    resolved = tensor.resolve_conj().resolve_neg()
    return resolved.contiguous().view(-1).view(torch.uint8)

"""All-reduce of whole gradients, and of the residual with them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from topq_dist.compress.coherence import NO_COHERENCE
from topq_dist.compress.compressor import TopKCompressor
from topq_dist.exchange.base import Exchange, ExchangeWork, Outgoing
from topq_dist.exchange.collectives import CommContext, member

# all at once, what many sparse steps have left would be one step many times as long
_FLUSH_STEPS = 32
# of these fully_shard has its collectives take the mean, of others it adds up and divides later
AVERAGED = (torch.float32, torch.bfloat16)


class Dense(Exchange):
    """Plain all-reduce, where nothing beats it.

    The residual is flushed in equal shares with the gradients of the first 32 steps, counted by
    `resume` anew. From `resume` on, which tells of one that may be there on any rank, a step that
    overflows is void. Among replicas of shards the mean has the bits that fully_shard's own
    all-reduce gives it.

    leaves_sums: of a vector in which nothing has a name, and of a dtype that fully_shard itself
        adds up, leave the sum.
    """

    frames_per_bucket = 0
    carries_settings = False
    sparse = False

    def __init__(
        self, context: CommContext, compressor: TopKCompressor, *, leaves_sums: bool = False
    ) -> None:
        self._context = context
        self.compressor = compressor
        self._leaves_sums = leaves_sums
        self._may_flush = False

    def begin_step(self) -> None:
        self.dense_steps += 1

    def resume(self, chosen: str | None, dense_steps: int) -> None:
        self.dense_steps = dense_steps
        # one rank may hold a residual where another has none, so all go by what they know alike
        self._may_flush = True

    def launch(self, outgoing: Outgoing) -> ExchangeWork:
        share = 1.0 / max(1, _FLUSH_STEPS + 1 - self.dense_steps)
        return AllReduceWork(
            outgoing,
            self._context,
            self.compressor,
            share,
            may_flush=self._may_flush,
            leaves_sums=self._leaves_sums,
        )


class AllReduceWork:
    """A bucket on its way, with a share of its residual.

    may_flush: whether there may be a residual on any rank; the same on all of them.
    """

    coherence = NO_COHERENCE

    def __init__(
        self,
        outgoing: Outgoing,
        context: CommContext,
        compressor: TopKCompressor,
        share: float,
        *,
        may_flush: bool,
        leaves_sums: bool,
    ) -> None:
        bucket, layout = outgoing.bucket, outgoing.layout
        self._bucket = bucket
        self._context = context
        self._may_flush = may_flush
        self._residuals = compressor.residuals
        self._update = compressor.flush_residual(layout, bucket, share)
        reduction = dist.ReduceOp.SUM
        if context.shards is not None and bucket.dtype in AVERAGED:
            reduction = dist.ReduceOp.AVG
        elif layout.names or not leaves_sums:
            # as DistributedDataParallel does
            bucket.div_(context.size)
        self._work = member(
            dist.all_reduce(bucket, op=reduction, group=context.group, async_op=True)
        )
        context.meter.add(
            sent_bytes=bucket.nbytes,
            wire_bytes=2 * bucket.nbytes * (context.size - 1) // context.size,
        )

    def advance(self) -> None:
        pass

    def receive(self) -> bool:
        with self._context.meter.timed("wait_s"):
            self._work.wait()
        # with no residual anywhere there is nothing to protect: overflow shows in the gradient, as
        # it does without a hook
        return not self._may_flush or _is_finite(self._bucket)

    def exceeds(self, limit: float) -> bool:
        return self._may_flush and bool((self._bucket.abs() > limit).any())

    def deliver(self) -> None:
        self._residuals.apply(self._update)


def _is_finite(vector: Tensor) -> bool:
    # a tenth of the time of isfinite().all(), which makes vectors of what it has found
    return not vector.numel() or bool(torch.stack(torch.aminmax(vector)).isfinite().all())

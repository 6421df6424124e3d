"""All-reduce of whole gradients, and what is owed with them."""

from __future__ import annotations

import torch
import torch.distributed as dist

from topq_dist.compress.coherence import NO_COHERENCE
from topq_dist.compress.compressor import FlatCompressor
from topq_dist.exchange.base import Exchange, Job, Link, Pending
from topq_dist.exchange.collectives import member

# all at once, what many sparse steps have left would be one step many times as long
_PAY_STEPS = 32


class Dense(Exchange):
    """Plain all-reduce, where nothing beats it.

    What is still owed is paid in equal shares with the gradients of 32 steps, the first
    `unpaid_steps` left out.
    """

    tells = False
    sparse = False

    def __init__(self, link: Link, compressor: FlatCompressor, *, unpaid_steps: int = 0) -> None:
        self._link = link
        self._compressor = compressor
        self._unpaid_steps = unpaid_steps

    def begin_step(self) -> None:
        self.dense_steps += 1

    def resume(self, chosen: str | None, dense_steps: int) -> None:
        self.dense_steps = dense_steps

    def launch(self, job: Job) -> Pending:
        step = self.dense_steps - 1
        left = self._unpaid_steps + _PAY_STEPS - step
        share = 0.0 if step < self._unpaid_steps else 1.0 / max(1, left)
        return _Reducing(job, self._link, self._compressor, share)


class _Reducing:
    coherence = NO_COHERENCE

    def __init__(self, job: Job, link: Link, compressor: FlatCompressor, share: float) -> None:
        self._job = job
        self._link = link
        self._compressor = compressor
        self._payment = compressor.pay(job.layout, job.bucket, share) if share else None
        job.bucket.div_(link.size)
        work = dist.all_reduce(job.bucket, group=link.group, async_op=True)
        self._work = member(work)
        sent_bytes = job.bucket.nbytes
        link.meter.add(
            sent_bytes=sent_bytes, wire_bytes=2 * sent_bytes * (link.size - 1) // link.size
        )

    def advance(self) -> None:
        pass

    def receive(self) -> bool:
        with self._link.meter.timed("wait_s"):
            self._work.wait()
        # with nothing owed there is nothing to protect: overflow shows in the gradient, as it
        # does without a hook
        return self._payment is None or bool(torch.isfinite(self._job.bucket).all())

    def deliver(self) -> None:
        if self._payment is not None:
            self._payment()

"""One backward pass: buckets compressed and launched as they come, all of them finished at its end.

Everything happens on the thread of the backward pass, so that every rank issues its collectives
in one order, and an error is raised where the user called backward().
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.futures import Future

from topq_dist.compress.compressor import Compressed, FlatCompressor
from topq_dist.compress.feedback import Layout
from topq_dist.ddp.auto import Auto
from topq_dist.ddp.density import Density
from topq_dist.ddp.exchange import AllGather, Exchange, Job, Link, Pending
from topq_dist.ddp.messages import ExchangeError, SettingsDifferError, agree, digest


class Bucket(NamedTuple):
    """What is needed of one of DDP's buckets; `flat` is 1-D and takes the average."""

    flat: Tensor
    layout: Layout
    parameters: Sequence[Tensor]
    future: Future[Tensor]


class Pipeline:
    """Carries the buckets of each backward pass from gradient to average."""

    def __init__(
        self,
        link: Link,
        density: Density,
        compressor: FlatCompressor,
        *,
        clip_norm: float | None,
        grad_scaler: GradScaler | None,
    ) -> None:
        self._link = link
        self._density = density
        self._compressor = compressor
        self.exchange: Exchange = AllGather(link)
        self._clip_norm = clip_norm
        self._grad_scaler = grad_scaler
        self._scale = 1.0
        self._settings_digest = 0
        self._failure: Exception | None = None
        self._held: list[Bucket] = []
        self._in_flight: list[tuple[Bucket, Pending]] = []

    def settings(self) -> str:
        """Return this step's settings, the same text on ranks that work alike."""
        clip = f"clip_norm={self._clip_norm} grad_scaler={self._grad_scaler is not None}"
        return f"{self._density.settings()}\n{self._compressor.settings()} {clip}"

    def push(self, bucket: Bucket, *, first: bool, last: bool) -> None:
        """Take the next bucket of a backward pass; its future is done once `last` has come.

        Raises ExchangeError on every rank where ranks disagree or one has failed.
        """
        if first:
            self._begin()
        if self._grad_scaler is not None:
            bucket.flat.mul_(1.0 / self._scale)
        if self._clip_norm is None:
            self._launch(bucket)
        else:
            # the norm is that of the whole gradient, known when the last bucket is
            self._held.append(bucket)
            if last:
                self._clip(self._held, self._clip_norm)
                for held in self._held:
                    self._launch(held)
        if last:
            self._finish()

    def _begin(self) -> None:
        # what an aborted backward pass left behind is of no use to anyone
        self._held = []
        self._in_flight = []
        self._failure = None
        if isinstance(self.exchange, Auto):
            self.exchange.begin_step()
        if self._grad_scaler is not None:
            self._scale = self._grad_scaler.get_scale()
        try:
            self._density.begin_step()
            self._settings_digest = digest(self.settings())
        except (TypeError, ValueError) as failure:
            self._failure = failure

    def _clip(self, buckets: Sequence[Bucket], clip_norm: float) -> None:
        norms = [torch.linalg.vector_norm(b.flat, dtype=torch.float32) for b in buckets]
        norm = float(torch.linalg.vector_norm(torch.stack([n.cpu() for n in norms])))
        # an overflowed gradient is sent as such, not made NaN all over
        if clip_norm < norm < float("inf"):
            for bucket in buckets:
                bucket.flat.mul_(clip_norm / norm)

    def _launch(self, bucket: Bucket) -> None:
        job = Job(
            bucket=bucket.flat,
            layout=bucket.layout,
            settings_digest=self._settings_digest,
            compress=lambda parts: self._compress(bucket, parts),
        )
        pending = self.exchange.launch(job)
        self._link.meter.add(dense_bytes=bucket.flat.nbytes)
        if self._in_flight:
            self._in_flight[-1][1].advance()
        self._in_flight.append((bucket, pending))

    def _compress(self, bucket: Bucket, parts: int) -> Compressed | None:
        if self._failure is not None:
            return None
        try:
            with self._link.meter.timed("select_s"):
                cuts = self._density.cuts(bucket.parameters)
                return self._compressor.compress(bucket.flat, bucket.layout, cuts, parts=parts)
        except Exception as failure:  # noqa: BLE001 - raised once the other ranks have been told
            self._failure = failure
            return None

    def _finish(self) -> None:
        in_flight, self._in_flight = self._in_flight, []
        self._held = []
        try:
            in_flight[-1][1].advance()
            finite = [pending.receive() for _, pending in in_flight]
        except SettingsDifferError:
            # every rank is here, having read the same digests, and may ask for the particulars
            agree(self.settings(), group=self._link.group, device=self._link.device)
            raise
        except ExchangeError as error:
            raise self._failure or error from None
        if self._failure is not None:
            raise self._failure
        for bucket, pending in in_flight:
            if not all(finite):
                bucket.flat.fill_(torch.nan)
            else:
                pending.deliver()
                if self._grad_scaler is not None:
                    bucket.flat.mul_(self._scale)
            bucket.future.set_result(bucket.flat)
        self._link.meter.add(steps=1)

"""One backward pass: buckets compressed and launched as they come, all of them finished at its end.

Everything happens on the thread of the backward pass, so that every rank issues its collectives
in one order, and an error is raised where the user called backward().
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.futures import Future

from topq_dist.compress.coherence import total
from topq_dist.compress.compressor import Compressed, FlatCompressor
from topq_dist.compress.layout import Layout
from topq_dist.compress.sparsify.segments import Cut
from topq_dist.ddp.momentum import Momentum
from topq_dist.ddp.sparsity_policy import Density
from topq_dist.exchange.agreement import ExchangeError, SettingsDifferError, agree, digest
from topq_dist.exchange.base import Exchange, Job, Link, Pending
from topq_dist.exchange.collectives import NO_FRAME, FrameGather, GatherLane


class Bucket(NamedTuple):
    """What is needed of one of DDP's buckets; `flat` is 1-D and takes the average."""

    flat: Tensor
    layout: Layout
    parameters: Sequence[Tensor]
    future: Future[Tensor]


@dataclass(frozen=True, kw_only=True)
class Stages:
    """What a bucket goes through before it is exchanged.

    may_be_unused: DDP leaves a parameter's gradient alone where no rank has used it, so nothing
    may be sent for one whose own gradient is all zero.
    """

    density: Density
    compressor: FlatCompressor
    momentum: Momentum
    clip_norm: float | None
    grad_scaler: GradScaler | None
    may_be_unused: bool

    def settings(self) -> str:
        """Return this step's settings, the same text on ranks that work alike."""
        clip = f"clip_norm={self.clip_norm} grad_scaler={self.grad_scaler is not None}"
        compressed = f"{self.compressor.settings()} {clip} {self.momentum.settings()}"
        return f"{self.density.settings()}\n{compressed}"


class Pipeline:
    """Carries the buckets of each backward pass from gradient to average."""

    def __init__(self, link: Link, stages: Stages, exchange: Exchange) -> None:
        self._link = link
        self._stages = stages
        self._exchange = exchange
        self._scale = 1.0
        self._settings_digest = 0
        self._failure: Exception | None = None
        self._held: list[Bucket] = []
        self._in_flight: list[tuple[Bucket, Pending]] = []
        self._announcement: FrameGather | None = None
        self._announcing = GatherLane()

    def push(self, bucket: Bucket, *, first: bool, last: bool) -> None:
        """Take the next bucket of a backward pass; its future is done once `last` has come.

        Raises ExchangeError on every rank where ranks disagree or one has failed.
        """
        if first:
            self._begin()
        if self._stages.grad_scaler is not None:
            bucket.flat.mul_(1.0 / self._scale)
        if self._stages.clip_norm is None:
            self._launch(bucket)
        else:
            # the norm is that of the whole gradient, known when the last bucket is
            self._held.append(bucket)
            if last:
                _clip(self._held, self._stages.clip_norm)
                for held in self._held:
                    self._launch(held)
        if last:
            self._finish()

    def _begin(self) -> None:
        # what an aborted backward pass left behind is of no use to anyone
        self._held = []
        self._in_flight = []
        self._failure = None
        self._exchange.begin_step()
        if self._stages.grad_scaler is not None:
            self._scale = self._stages.grad_scaler.get_scale()
        try:
            self._stages.density.begin_step()
            self._stages.momentum.begin_step(
                sparse=self._exchange.sparse, sent_fraction=self._stages.density.sent_fraction()
            )
            self._settings_digest = digest(self._settings())
        except Exception as failure:  # noqa: BLE001 - raised once the other ranks have been told
            self._failure = failure
        self._announcement = None if self._exchange.tells else self._announce()

    def _settings(self) -> str:
        return f"{self._stages.settings()}\n{self._exchange.settings()}"

    def _announce(self) -> FrameGather:
        """Tell every rank of this one's settings and failure, where no frame of its will."""
        return FrameGather(
            NO_FRAME if self._failure is None else None,
            settings_digest=self._settings_digest,
            lane=self._announcing,
            group=self._link.group,
            device=self._link.device,
            meter=self._link.meter,
        )

    def _launch(self, bucket: Bucket) -> None:
        job = Job(
            bucket=bucket.flat,
            layout=bucket.layout,
            settings_digest=self._settings_digest,
            compress=lambda parts: self._compress(bucket, parts),
        )
        pending = self._exchange.launch(job)
        self._link.meter.add(dense_bytes=bucket.flat.nbytes)
        if self._in_flight:
            self._in_flight[-1][1].advance()
        self._in_flight.append((bucket, pending))

    def _compress(self, bucket: Bucket, parts: int) -> Compressed | None:
        if self._failure is not None:
            return None
        try:
            with self._link.meter.timed("select_s"):
                cuts = self._stages.density.cuts(bucket.parameters)
                if self._stages.may_be_unused:
                    cuts = [_unless_unused(cut, bucket.flat) for cut in cuts]
                return self._stages.momentum.compress(
                    self._stages.compressor,
                    bucket.flat,
                    bucket.layout,
                    bucket.parameters,
                    cuts,
                    parts=parts,
                )
        except Exception as failure:  # noqa: BLE001 - raised once the other ranks have been told
            self._failure = failure
            return None

    def _finish(self) -> None:
        in_flight, self._in_flight = self._in_flight, []
        self._held = []
        try:
            if self._announcement is not None:
                self._announcement.frames()
            in_flight[-1][1].advance()
            finite = [pending.receive() for _, pending in in_flight]
        except SettingsDifferError:
            # every rank is here, having read the same digests, and may ask for the particulars
            agree(self._settings(), group=self._link.group, device=self._link.device)
            raise
        except ExchangeError as error:
            raise self._failure or error from None
        if all(finite):
            self._stages.momentum.end_step(total([pending.coherence for _, pending in in_flight]))
        for bucket, pending in in_flight:
            if not all(finite):
                bucket.flat.fill_(torch.nan)
            else:
                pending.deliver()
                if self._stages.grad_scaler is not None:
                    bucket.flat.mul_(self._scale)
            bucket.future.set_result(bucket.flat)
        self._link.meter.add(steps=1)


def _clip(buckets: Sequence[Bucket], clip_norm: float) -> None:
    norms = [torch.linalg.vector_norm(b.flat, dtype=torch.float64) for b in buckets]
    norm = math.hypot(*(float(norm) for norm in norms))
    # an overflowed gradient is sent as such, not made NaN all over
    if clip_norm < norm < math.inf:
        for bucket in buckets:
            bucket.flat.mul_(clip_norm / norm)


def _unless_unused(cut: Cut, flat: Tensor) -> Cut:
    return cut if bool(flat[cut.stretch].any()) else replace(cut, kept=0)

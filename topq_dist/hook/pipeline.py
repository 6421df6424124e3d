"""One backward pass: buckets compressed and launched as they come, all of them finished at its end.

Everything happens on the thread of the backward pass, so that every rank issues its collectives
in one order, and an error is raised where the user called backward().
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.futures import Future

from topq_dist.compress.coherence import total
from topq_dist.compress.compressor import Compressed
from topq_dist.compress.layout import Layout, OutOfRows
from topq_dist.compress.residual import ResidualUpdate
from topq_dist.compress.sparsify.segments import Segments
from topq_dist.compress.unsent import UnsentWatch
from topq_dist.exchange.agreement import (
    ExchangeError,
    SettingsDifferError,
    check_same_on_all_ranks,
    digest,
)
from topq_dist.exchange.base import Exchange, ExchangeWork, Outgoing
from topq_dist.exchange.collectives import AllGatherLane, CommContext, FrameAllGather
from topq_dist.exchange.shards import (
    Outcome,
    agree_on_outcome,
    norm_over_shards,
    tell_of_failed_step,
)
from topq_dist.exchange.slots import NO_FRAME
from topq_dist.hook.stages import Layouts, Stages
from topq_dist.profiling import labelled

_LARGEST_HALF = torch.finfo(torch.float16).max


class Bucket(NamedTuple):
    """What is needed of a bucket; `flat` is 1-D and takes the average.

    given: what the caller has given, and looks at; `flat` itself unless that is a copy in fp32.
    out_of_rows: what is brought into rows for as long as it is on its way.
    """

    flat: Tensor
    given: Tensor
    layout: Layout
    out_of_rows: Sequence[OutOfRows]
    parameters: Sequence[Tensor]
    future: Future[Tensor]


class Pipeline:
    """Carries the buckets of each backward pass from gradient to average.

    commit: called once all of a pass is received, before anything of it is applied; returns where
    every rank has it, and raises where one has not.
    """

    def __init__(
        self,
        context: CommContext,
        stages: Stages,
        exchange: Exchange,
        layouts: Layouts,
        commit: Callable[[], None] | None = None,
    ) -> None:
        self._commit = commit
        self._context = context
        self._stages = stages
        self._exchange = exchange
        self._layouts = layouts
        self._scale = 1.0
        self._settings_digest = 0
        self._failure: Exception | None = None
        self._held: list[Bucket] = []
        self._in_flight: list[tuple[Bucket, ExchangeWork]] = []
        self._announcement: FrameAllGather | None = None
        self._announcing = AllGatherLane()
        # where somebody looks on
        self.watch: UnsentWatch | None = None
        self._watched: list[ResidualUpdate] = []

    def push(
        self, flat: Tensor, parameters: Sequence[Tensor], *, first: bool, last: bool
    ) -> Future[Tensor]:
        """Take the next bucket of a backward pass; its future is done once `last` has come.

        Raises ExchangeError on every rank where ranks disagree or one has failed.
        """
        if first:
            self._begin()
        layout, out_of_rows = self._layouts.of(parameters)
        for one in out_of_rows:
            one.to_rows(flat)
        unscaled = self._unscaled(flat, parameters)
        bucket = Bucket(unscaled, flat, layout, out_of_rows, parameters, future_of(flat))
        if self._stages.clip_norm is None:
            self._launch(bucket)
        else:
            # the norm is that of the whole gradient, known when the last bucket is
            self._held.append(bucket)
            if last:
                _clip(self._held, self._stages.clip_norm, self._context)
                for held in self._held:
                    self._launch(held)
        if last:
            self._finish()
        return bucket.future

    def _unscaled(self, flat: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """Return a bucket without the loss scale: itself, or a copy where it is of float16."""
        if self._stages.grad_scaler is None:
            return flat
        if flat.dtype != torch.float16:
            return flat.mul_(1.0 / self._scale)
        # without names it is all-reduced as it is, scale and all, as fully_shard would
        return flat.float().mul_(1.0 / self._scale) if parameters else flat

    def _scale_again(self, bucket: Bucket) -> None:
        """Have what the caller has given hold the average, with the loss scale."""
        if self._stages.grad_scaler is None:
            return
        if bucket.flat is not bucket.given:
            bucket.given.copy_(bucket.flat.mul_(self._scale))
        elif bucket.flat.dtype != torch.float16:
            bucket.flat.mul_(self._scale)

    def _begin(self) -> None:
        # what an aborted backward pass left behind is of no use to anyone
        self._held = []
        self._in_flight = []
        self._watched = []
        if self.watch is not None:
            self.watch.void()
        self._failure = None
        with self._telling_of_errors():
            # of the last step, of which every rank may hear only now
            self._exchange.begin_step()
        if self._stages.grad_scaler is not None:
            self._scale = self._stages.grad_scaler.get_scale()
        try:
            self._stages.model.begin_step()
            self._stages.sparsity.begin_step()
            self._stages.momentum.begin_step(
                sparse=self._exchange.sparse,
                sent_fraction=self._stages.sparsity.sent_fraction(),
                skip_unused=self._stages.model.may_be_unused,
            )
            self._settings_digest = digest(self._settings())
        except Exception as failure:  # noqa: BLE001 - raised once the other ranks have been told
            self._failure = failure
        self._announcement = None if self._exchange.carries_settings else self._announce()
        if self._context.shards is not None:
            # vectors may be of different lengths where ranks disagree
            self._check_announced()

    def _settings(self) -> str:
        settings = f"{self._stages.settings()}\n{self._exchange.settings()}"
        # by which ranks find the same averages too large
        return f"{settings}\nscale={self._scale}" if self._stages.scales_half else settings

    def _announce(self) -> FrameAllGather:
        """Tell every rank of this one's settings and failure, where no frame of its will."""
        return FrameAllGather(
            NO_FRAME if self._failure is None else None,
            self._announcing,
            self._context,
            settings_digest=self._settings_digest,
        )

    def _launch(self, bucket: Bucket) -> None:
        self._exchange.prepare(bucket.flat)
        compressed = self._compress(bucket)
        work = self._exchange.launch(
            Outgoing(bucket.flat, bucket.layout, compressed, self._settings_digest)
        )
        self._context.meter.add(dense_bytes=bucket.given.nbytes)
        if self._in_flight:
            self._in_flight[-1][1].advance()
        self._in_flight.append((bucket, work))

    def _compress(self, bucket: Bucket) -> Compressed | None:
        """Return the frames of a bucket; None where none is asked for, or this rank has failed."""
        parts = self._exchange.frames_per_bucket
        if self._failure is not None or not parts:
            return None
        meter = self._context.meter
        try:
            with meter.timed("select_s"), labelled("select and encode"):
                segments = self._stages.sparsity.segments(bucket.parameters)
                if self._stages.model.may_be_unused:
                    self._exchange.check_takes_unused()
                    segments = _of_used(Segments.of(segments), bucket.flat)
                compressed = self._stages.momentum.compress(
                    self._exchange.compressor,
                    bucket.flat,
                    bucket.layout,
                    bucket.parameters,
                    segments,
                    parts=parts,
                )
            meter.encode_s += compressed.encode_s
            if self.watch is not None and self._exchange.sparse and compressed.update is not None:
                self.watch.compressed(compressed.update)
                self._watched.append(compressed.update)
            return compressed
        except Exception as failure:  # noqa: BLE001 - raised once the other ranks have been told
            self._failure = failure
            return None

    def _finish(self) -> None:
        in_flight, self._in_flight = self._in_flight, []
        self._held = []
        meter = self._context.meter
        began_s, before = time.perf_counter(), meter.stats
        with labelled("wait and decode"):
            mine = self._receive(in_flight)
            outcome = agree_on_outcome(mine, self._settings, self._context)
            if self._commit is not None:
                self._commit()
        if outcome.finite:
            self._stages.momentum.end_step(outcome.coherence)
            self._stages.sparsity.end_step()
        with labelled("average and update residuals"):
            for bucket, work in in_flight:
                if not outcome.finite:
                    bucket.given.fill_(torch.nan)
                else:
                    work.deliver()
                    self._scale_again(bucket)
                    for out_of_rows in bucket.out_of_rows:
                        out_of_rows.to_memory(bucket.given)
                bucket.future.set_result(bucket.given)
        self._stages.model.end_step(self._layouts.seen)
        if self._stages.scale_watch is not None and bucket.parameters:
            self._stages.scale_watch.saw(bucket.flat, bucket.layout, bucket.parameters)
        meter.add(steps=1)
        after = meter.stats
        # in between it has waited, and with "split" selected once more
        aside_s = after.wait_s - before.wait_s + after.select_s - before.select_s
        meter.decode_s += time.perf_counter() - began_s - aside_s
        self._look_on(counts=outcome.finite)

    def _look_on(self, *, counts: bool) -> None:
        """Have who looks on see the step that is over."""
        if not counts:
            self._context.meter.void_steps += 1
        if self.watch is None:
            return
        if counts:
            self.watch.applied(self._watched)
        else:
            self.watch.void()
        self._watched = []

    def _receive(self, in_flight: Sequence[tuple[Bucket, ExchangeWork]]) -> Outcome:
        """Wait for the other ranks of the exchange, and return what has come of the step there."""
        works = [work for _, work in in_flight]
        self._check_announced()
        with self._telling_of_errors():
            works[-1].advance()
            finite = [work.receive() for work in works]
            counts = all(finite) and not self._overflows(in_flight)
        return Outcome(counts, total(work.coherence for work in works))

    def _overflows(self, in_flight: Sequence[tuple[Bucket, ExchangeWork]]) -> bool:
        """Return whether an average is too large for float16 once it has the loss scale again."""
        limit = _LARGEST_HALF / self._scale
        return any(
            work.exceeds(limit) for bucket, work in in_flight if bucket.flat is not bucket.given
        )

    def _check_announced(self) -> None:
        """Wait for what the other ranks have announced, if that is still to come."""
        announcement, self._announcement = self._announcement, None
        if announcement is not None:
            with self._telling_of_errors():
                announcement.frames()

    @contextmanager
    def _telling_of_errors(self) -> Iterator[None]:
        """Say more of an error of the exchange, which every rank has, and tell other shards."""
        try:
            with self._explaining():
                yield
        except Exception as error:
            tell_of_failed_step(error, self._context)
            raise

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except SettingsDifferError:
            # every rank is here, having read the same digests, and may ask for the particulars
            check_same_on_all_ranks(
                self._settings(), group=self._context.group, device=self._context.device
            )
            raise
        except ExchangeError as error:
            raise self._failure or error from None


def future_of(flat: Tensor) -> Future[Tensor]:
    """Return what is done once a bucket holds the average."""
    # which lets whoever waits for it go on in the device's own order
    return Future(devices=[flat.device]) if flat.is_cuda else Future()


def _clip(buckets: Sequence[Bucket], clip_norm: float, context: CommContext) -> None:
    norms = [torch.linalg.vector_norm(b.flat, dtype=torch.float64) for b in buckets]
    norm = norm_over_shards(math.hypot(*(float(norm) for norm in norms)), context)
    # an overflowed gradient is sent as such, not made NaN all over
    if clip_norm < norm < math.inf:
        for bucket in buckets:
            bucket.flat.mul_(clip_norm / norm)


def _of_used(segments: Segments, flat: Tensor) -> Segments:
    return segments.without([not bool(flat[segment.where].any()) for segment in segments])

"""Split-reduce among mirrors: the parts of other ranks are made of this one's."""

# no annotations from the future: DistributedDataParallel reads a hook's

import time
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from topq_dist.advice.mirror import MirrorGroup
from topq_dist.compress.codec.frame import decode_frame, encode_frame, peek_header
from topq_dist.compress.codec.values import quantize
from topq_dist.compress.coherence import NO_COHERENCE, Coherence
from topq_dist.compress.partition import BlockCyclicPartition
from topq_dist.ddp.parts import make_parts
from topq_dist.exchange.base import Outgoing
from topq_dist.exchange.collectives import AllToAllLanes, CommContext
from topq_dist.exchange.split_reduce import SplitReduce, SplitReduceWork
from topq_dist.hook.parts import HookParts, Knobs
from topq_dist.hook.pipeline import Pipeline
from topq_dist.telemetry.stats import Meter


def register_mirrored_split(
    model: DistributedDataParallel, optimizer: Optimizer, knobs: Knobs, mirror: MirrorGroup
) -> HookParts:
    """Have a model among mirrors exchange by "split", and return the hook's parts."""
    parts = make_parts(knobs, model, optimizer)
    device = next(model.parameters()).device
    context = CommContext(group=mirror, device=device, meter=Meter())
    exchange = _MirroredSplit(context, parts.stages.compressor)
    parts.stages.momentum.attach()
    pipeline = Pipeline(context, parts.stages, exchange, parts.layouts)
    model.register_comm_hook(pipeline, _hook)
    return parts


def _hook(pipeline: Pipeline, bucket: dist.GradBucket) -> Future[Tensor]:
    return pipeline.push(
        bucket.buffer(), bucket.parameters(), first=bucket.index() == 0, last=bucket.is_last()
    )


class _MirroredSplit(SplitReduce):
    def launch(self, outgoing: Outgoing) -> SplitReduceWork:
        return _MirroredWork(
            outgoing,
            self._context,
            self.compressor,
            self._reducer,
            self._lanes.of(outgoing.layout),
        )


class _MirroredWork(SplitReduceWork):
    def _exchange(  # type: ignore[override]
        self,
        frames: Sequence[Tensor] | None,
        lanes: AllToAllLanes,
        coherence: Coherence = NO_COHERENCE,
    ) -> "_MirrorFrames":
        if frames is None:
            # of mirrors, none fails where this one does not
            raise ValueError("gradients could not be compressed: expected finite ones")
        mirror, began_s = self._context.group, time.perf_counter()
        assert isinstance(mirror, MirrorGroup)  # noqa: S101 - it was made with one
        partition = BlockCyclicPartition(
            numel=self._outgoing.bucket.numel(), count=self._context.size
        )
        others = range(1, self._context.size)
        reduced = lanes is self._reduced_lanes
        theirs = [
            _refitted(frames[rank], partition.numel_of(rank if reduced else 0)) for rank in others
        ]
        for rank in others:
            lanes.outgoing[rank].fit(frames[rank].numel())
        sent_bytes = sum(lanes.outgoing[rank].bytes for rank in others)
        mirror.note("all_to_all", torch.uint8, sent_bytes)
        mirror.aside_s += time.perf_counter() - began_s
        return _MirrorFrames([frames[0], *theirs], coherence)


class _MirrorFrames:
    """Frames that have come."""

    def __init__(self, frames: Iterable[Tensor], coherence: Coherence) -> None:
        self._frames = list(frames)
        self.coherence = coherence

    def frames(self) -> list[Tensor]:
        return self._frames


def _refitted(frame: Tensor, numel: int) -> Tensor:
    """Return a part's frame as one of a part of another length: they differ by a block."""
    header = peek_header(frame)
    decoded = decode_frame(frame, numel=header.numel)
    k = int(torch.searchsorted(decoded.indices, numel))
    rounded = quantize(decoded.values[:k], header.value_format)
    return encode_frame(numel, decoded.indices[:k], rounded)

"""All-gather of frames that lie in slots on the device, from where they are made to the average.

With NCCL nothing of a step comes to the host: whether it counts is decided on the device, from the
slots of all ranks, and the host hears of it one step later. With gloo, whose collectives are the
host's, the slots go through pinned memory, nothing else does, and the host looks at them there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from topq_dist.compress.codec.frame import FrameError
from topq_dist.compress.coherence import NO_COHERENCE, Coherence, total
from topq_dist.compress.device_compressor import DeviceCompressor, slot_bytes
from topq_dist.compress.gpu.frames import Written
from topq_dist.compress.layout import LayoutCache
from topq_dist.exchange.agreement import ExchangeError
from topq_dist.exchange.base import Exchange, Outgoing
from topq_dist.exchange.collectives import CommContext, member
from topq_dist.exchange.slots import Head, check_heads, is_finite, unpack, write_head

# of the settings of ranks whose frames stay on the device
ON_DEVICE = "frames on the device"
# what a report says of a rank, see kernels/frames.py
_NOT_FINITE, _FAILED, _DIFFERS, _DAMAGED = 1, 2, 4, 8
# room for a head alone: what every rank begins with; and for the longest header behind it
_LEAST_BYTES = 64
_LOOKED_AT_BYTES = 128


class _Lane:
    """What one bucket keeps between steps: its slot, and those of all ranks."""

    def __init__(self) -> None:
        self.bytes = _LEAST_BYTES
        # an aborted pass never brings back what its collective may still write to
        self.lent = False
        self.sent = self.received = torch.empty(0, dtype=torch.uint8)
        self.outside: Tensor | None = None
        self.inside: Tensor | None = None

    def fit(self, ranks: int, device: torch.device, *, staged: bool) -> None:
        """Have buffers of the lane's length, for the ranks that there are."""
        shape, lent = (ranks, self.bytes), self.lent
        if not lent and self.received.shape == shape and self.received.device == device:
            return
        self.lent = False
        self.sent = torch.zeros(self.bytes, dtype=torch.uint8, device=device)
        self.received = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.outside = self.inside = None
        if staged:
            self.outside = torch.zeros(self.bytes, dtype=torch.uint8, pin_memory=True)
            self.inside = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)


class DeviceAllGather(Exchange):
    """Every rank's slot goes to every rank, and is never larger than its bucket's settings allow.

    compressor: of the device of `context`. late: check the other ranks' settings and failures one
    step later, without waiting; else with the slots, in host memory.
    """

    compressor: DeviceCompressor

    def __init__(self, context: CommContext, compressor: DeviceCompressor, *, late: bool) -> None:
        self.compressor = compressor
        self.context = context
        self.late = late
        self.staged = context.device.type != "cpu" and dist.get_backend(context.group) == "gloo"
        self.lanes = LayoutCache(_Lane)
        device = context.device
        self.nothing = torch.zeros(2, dtype=torch.float64, device=device)
        self.report = torch.zeros(context.size, dtype=torch.int64, device=device)
        pinned = device.type != "cpu"
        self._told = torch.zeros(context.size, dtype=torch.int64, pin_memory=pinned)
        self._event: torch.cuda.Event | None = None
        if pinned:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._has_told = False

    def settings(self) -> str:
        return ON_DEVICE

    def check_takes_unused(self) -> None:
        raise ValueError(
            "find_unused_parameters is True by now: expected it to be so when the hook was made, "
            "which exchanges frames of one length on the device"
        )

    def begin_step(self) -> None:
        """Raise what the last step's slots have said, see `late`."""
        told, self._has_told = self._has_told, False
        self.report = torch.zeros_like(self.report)
        if not told:
            return
        if self._event is not None:
            # long past, a whole step later
            self._event.synchronize()
        said = self._told.numpy()
        heads = [
            Head(0, int(bits & _DIFFERS), bool(bits & _FAILED), False) for bits in said.tolist()
        ]
        check_heads(heads)
        damaged = [str(rank) for rank, bits in enumerate(said.tolist()) if bits & _DAMAGED]
        if damaged:
            raise ExchangeError(
                f"the frame of rank {', '.join(damaged)} was damaged on its way, or is none of the "
                "last step's: expected the frames of all ranks, and this step has not counted here"
            )
        if self.late and (said & _NOT_FINITE).any():
            self.context.meter.void_steps += 1

    def tell(self) -> None:
        """Copy the report to the host, which looks at it when the next step begins."""
        self._told.copy_(self.report, non_blocking=True)
        if self._event is not None:
            self._event.record()
        self._has_told = True

    def launch(self, outgoing: Outgoing) -> DeviceAllGatherWork:
        return DeviceAllGatherWork(self, outgoing)


class DeviceAllGatherWork:
    """A bucket whose slots are on their way.

    Every rank's slot is as long as its lane, which all ranks know alike. Where a frame may be
    longer, as in the first step, a rank sends the head of one and waits for the others' heads, all
    of which say so unless one has failed or has other settings; then the lane grows.
    """

    def __init__(self, exchange: DeviceAllGather, outgoing: Outgoing) -> None:
        self._exchange = exchange
        compressed = outgoing.compressed
        self._selected = None if compressed is None else compressed.on_device
        self._own_coherence = self.coherence = outgoing.coherence
        self._settings_digest = outgoing.settings_digest
        self._lane = exchange.lanes.of(outgoing.layout)
        self._lane.fit(exchange.context.size, exchange.context.device, staged=exchange.staged)
        self._written: Written | None = None
        self._heads: Tensor | None = None
        self._work: dist.Work | None = None
        self._needed_bytes = 0 if self._selected is None else slot_bytes(self._selected.shape)
        self._grows = self._needed_bytes > self._lane.bytes
        self._failure: Exception | None = None
        self._fill_or_fail()
        if not exchange.staged:
            self._send()

    def advance(self) -> None:
        if self._work is None:
            self._send()

    def receive(self) -> bool:
        """Wait for the slots, and return whether the step is finite; if late, as far as is known.

        Raises what has kept this rank from filling its slot, once the others know that something
        has, and ExchangeError as every other exchange does.
        """
        exchange, lane = self._exchange, self._lane
        self._wait()
        looks = self._grows or self._selected is None or not exchange.late
        heads = self._look() if looks else []
        if self._grows:
            self._grows = False
            lane.bytes = max(self._needed_bytes, *(head.frame_bytes for head in heads))
            lane.fit(exchange.context.size, exchange.context.device, staged=exchange.staged)
            self._fill_or_fail()
            self._send()
            self._wait()
            heads = self._look()
        if self._selected is None:
            raise RuntimeError("a rank that has failed heard of it from no one")
        if looks:
            self.coherence = total(head.coherence for head in heads)
        self._heads = exchange.compressor.check(self._selected, lane.received, exchange.report)
        return not looks or self._is_finite()

    def exceeds(self, limit: float) -> bool:
        raise RuntimeError("averages on the device are not looked at: expected another exchange")

    def deliver(self) -> None:
        exchange, selected = self._exchange, self._selected
        if selected is None or self._written is None or self._heads is None:
            raise RuntimeError("a rank that has failed has nothing to deliver")
        exchange.compressor.finish(
            selected, self._written, self._lane.received, self._heads, exchange.report
        )
        with exchange.compressor.beside(exchange.context.device):
            exchange.tell()
        exchange.compressor.rejoin(exchange.context.device)

    def _fill_or_fail(self) -> None:
        try:
            self._fill()
        except Exception as failure:  # noqa: BLE001 - raised once the other ranks have been told
            self._failure = failure
            self._selected, self._grows, self._needed_bytes = None, False, 0
            self._fill()

    def _fill(self) -> None:
        """Write the slot: a frame, or the head of one that has no room or of a rank that failed."""
        lane, digest = self._lane, self._settings_digest
        if self._selected is None or self._grows:
            failed = self._selected is None
            head = Head(self._needed_bytes, digest, failed, self._grows, self._own_coherence)
            row = torch.zeros(_LEAST_BYTES, dtype=torch.uint8)
            write_head(row, head)
            lane.sent[:_LEAST_BYTES] = row.to(lane.sent.device)
            return
        self._written = self._exchange.compressor.write(
            self._selected, lane.sent, digest, self._on_device(self._own_coherence)
        )

    def _on_device(self, coherence: Coherence) -> Tensor:
        if coherence == NO_COHERENCE:
            return self._exchange.nothing
        return torch.tensor(coherence, dtype=torch.float64).to(self._exchange.context.device)

    def _send(self) -> None:
        exchange, lane = self._exchange, self._lane
        context = exchange.context
        sent, received = lane.sent, lane.received
        with exchange.compressor.beside(context.device):
            if lane.outside is not None and lane.inside is not None:
                lane.outside.copy_(sent, non_blocking=True)
                # a host's collective takes what is there when it is called
                torch.cuda.current_stream(context.device).synchronize()
                sent, received = lane.outside, lane.inside
            lane.lent = True
            self._work = member(
                dist.all_gather(list(received.unbind()), sent, group=context.group, async_op=True)
            )
        context.meter.add(sent_bytes=sent.numel(), wire_bytes=sent.numel() * (context.size - 1))

    def _wait(self) -> None:
        lane, exchange = self._lane, self._exchange
        with (
            exchange.context.meter.timed("wait_s"),
            exchange.compressor.beside(exchange.context.device),
        ):
            member(self._work).wait()
            lane.lent = False
            if lane.inside is not None:
                lane.received.copy_(lane.inside, non_blocking=True)

    def _look(self) -> list[Head]:
        """Return what the slots say, in rank order, on the host; raises what check_heads raises."""
        rows = self._rows()
        heads = [unpack(row) for row in rows]
        try:
            check_heads(heads)
        except ExchangeError as error:
            raise self._failure or error from None
        return heads

    def _rows(self) -> Sequence[Tensor]:
        lane = self._lane
        if lane.inside is not None:
            return [row[:_LOOKED_AT_BYTES] for row in lane.inside]
        # in the order of the stream that has waited for them
        with self._exchange.compressor.beside(lane.received.device):
            return [row[:_LOOKED_AT_BYTES].cpu() for row in lane.received]

    def _is_finite(self) -> bool:
        finite = True
        for rank, row in enumerate(self._rows()):
            try:
                finite &= is_finite(row)
            except FrameError as error:
                raise ExchangeError(
                    f"the frame of rank {rank} was damaged on its way: {error}"
                ) from error
        return finite

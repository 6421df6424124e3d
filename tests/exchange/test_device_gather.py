"""A steady step on the device: no wait for it, as many launches for 300 parameters as for one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from interpreted import DEVICE, DRY, LAUNCHES
from ranks import run_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from topq_dist.compress.compressor import TopKCompressor
from topq_dist.compress.device_compressor import DeviceCompressor, slot_bytes
from topq_dist.compress.layout import Layout
from topq_dist.compress.sparsify.segments import Segments, uniform_segments
from topq_dist.exchange.base import Outgoing
from topq_dist.exchange.collectives import CommContext
from topq_dist.exchange.device_gather import DeviceAllGather
from topq_dist.telemetry import Meter

pytestmark = pytest.mark.gloo
NUMEL = 1_200_000
# what makes the host wait for a device, or takes as long as the device needs
WAITS = ("_local_scalar_dense", "nonzero", "item", "equal", "masked_select", "unique")
LOOKS = ("cpu", "tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__")


class Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what waits for the device, and notes what is called and allocated."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[str] = []
        self.allocated: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name in WAITS:
            raise AssertionError(f"{name} waits for the device")
        result = func(*args, **(kwargs or {}))
        if name == "_to_copy" and result.device.type == "cpu" != args[0].device.type:
            raise AssertionError("a copy to pageable memory")
        self.calls.append(name)
        known = {one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)}
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, Tensor):
                storage = one.untyped_storage()
                if storage.data_ptr() not in known:
                    self.allocated[storage.data_ptr()] = storage.nbytes()
        return result


def refusing(name: str, allowed: Tensor) -> Callable[..., Any]:
    plain = getattr(Tensor, name)

    def refuse(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self is not allowed:
            raise AssertionError(f"Tensor.{name} waits for the device")
        return plain(self, *args, **kwargs)

    return refuse


def step(exchange: DeviceAllGather, bucket: Tensor, layout: Layout, segments: Segments) -> None:
    exchange.begin_step()
    compressed = exchange.compressor.compress(bucket, layout, segments)
    work = exchange.launch(Outgoing(bucket, layout, compressed, settings_digest=7))
    work.advance()
    work.receive()
    work.deliver()


def steady(rank: int) -> list[dict[str, Any]]:
    """Return what steady steps of one parameter and of 300 have called, launched and allocated."""
    device, group = torch.device(DEVICE), dist.group.WORLD
    assert group is not None
    context = CommContext(group=group, device=device, meter=Meter())
    found = []
    for count in (1, 300):
        inner = TopKCompressor(value_format="int2", error_feedback=True, bound=1.0)
        exchange = DeviceAllGather(context, DeviceCompressor(inner, device), late=True)
        numels = [NUMEL // count] * count
        layout = Layout(
            names=tuple(map(str, range(count))), shapes=tuple((numel,) for numel in numels)
        )
        segments = uniform_segments(numels, q=0.99, scope="parameter")
        bucket = torch.randn(NUMEL, device=device)

        DRY[0] = DEVICE == "cpu"
        shape = exchange.compressor.compress(bucket, layout, segments).on_device
        assert shape is not None
        lane = exchange.lanes.of(layout)
        # as after a first step, which is not a steady one
        lane.bytes = slot_bytes(shape.shape)
        for _ in range(2):
            step(exchange, bucket, layout, segments)
        LAUNCHES.clear()
        watching = Watching()
        with pytest.MonkeyPatch.context() as patched, watching:
            for name in LOOKS:
                patched.setattr(Tensor, name, refusing(name, exchange._told))
            step(exchange, bucket, layout, segments)
        residual = inner.residuals.home(layout)
        k = shape.shape.k
        assert residual.nbytes == bucket.nbytes
        assert exchange.compressor.arena.held_bytes <= bucket.nbytes
        # the selected elements of the step, and nothing as long as the vector
        assert sum(watching.allocated.values()) < 32 * k + 4096, watching.allocated
        assert lane.sent.nbytes == lane.received.nbytes == lane.bytes < 2 * k + 4000
        found.append({"launches": [one.name for one in LAUNCHES], "calls": sorted(watching.calls)})
    return found


def test_a_steady_step_waits_for_nothing(tmp_path: Path) -> None:
    ((one, many),) = run_ranks(1, steady, tmp_path)
    assert one == many
    assert len(one["launches"]) <= 26
    assert len(one["calls"]) <= 150

"""Where the engine on a device runs: on a GPU whose Triton can compile it, once it has been tried.

TOPQ_GPU=0 does without, as a machine without a GPU or without triton does. TOPQ_GPU=interpret is
for tests: with TRITON_INTERPRET=1 the kernels run on CPU tensors, by numpy, and slowly.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import TYPE_CHECKING

import torch

from topq_dist.compress.codec.frame import encode_frame
from topq_dist.compress.codec.values import quantize
from topq_dist.compress.gpu.memory import Arena
from topq_dist.compress.layout import ChunkedVector
from topq_dist.compress.locks import ForkSafeLock
from topq_dist.compress.sparsify.bounding import bounded
from topq_dist.compress.sparsify.segments import SegmentSelector, uniform_segments

if TYPE_CHECKING:
    from topq_dist.compress.gpu.select import DeviceSelector

_log = logging.getLogger(__name__)
_TRYING = ForkSafeLock()
_SETTINGS = ("", "0", "1", "interpret")


def runs_on(device: torch.device) -> bool:
    """Return whether gradients on `device` are compressed there.

    The first time for a device the kernels are compiled and tried; where that fails one warning
    says so. Raises ValueError for a TOPQ_GPU that is none of its settings.
    """
    setting = os.environ.get("TOPQ_GPU", "")
    if setting not in _SETTINGS:
        raise ValueError(f"TOPQ_GPU={setting!r}: expected one of {', '.join(_SETTINGS[1:])}")
    if setting == "0":
        return False
    if device.type == "cpu":
        return setting == "interpret" and _is_interpreted()
    return device.type == "cuda" and _works_on(device)


def make_selector(arena: Arena) -> DeviceSelector:
    """Return a selector for a device that the engine runs on; imports triton."""
    from topq_dist.compress.gpu.select import DeviceSelector

    return DeviceSelector(arena)


@cache
def _is_interpreted() -> bool:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("TOPQ_GPU='interpret' without TRITON_INTERPRET: expected that to be 1")
    return True


@cache
def _works_on(device: torch.device) -> bool:
    with _TRYING:
        try:
            _try_out(device)
        except Exception as error:  # noqa: BLE001 - whatever it is, there is another way
            _log.warning(
                "gradients on %s are compressed by torch operations: as exactly as by Triton's "
                "kernels, but slower (%s: %s)",
                device,
                type(error).__name__,
                error,
            )
            return False
    return True


def _try_out(device: torch.device) -> None:
    """Raise unless the kernels compile for a device, and steps there give the CPU's bits."""
    from topq_dist.compress.gpu.bounds import BoundTable
    from topq_dist.compress.gpu.frames import check_frames, read_frames, slot_bytes, write_frame
    from topq_dist.compress.gpu.shape import FrameShape
    from topq_dist.compress.gpu.update import DeviceSelected, finish

    segments = uniform_segments([20_000, 3, 9_000], q=0.98, scope="parameter")
    numel, ks = 29_003, segments.table[:, 3]
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(numel, generator=generator)
    arena, on_cpu, kept = Arena(), SegmentSelector(), residual.to(device, copy=True)
    on_device = make_selector(arena)
    shape = FrameShape(numel=numel, ks=ks, value_format="int2", device=device)
    bound = BoundTable(segments, device), 1.0
    slots = torch.zeros(1, slot_bytes(shape), dtype=torch.uint8, device=device)
    nothing = torch.zeros(2, dtype=torch.float64, device=device)
    for _ in range(3):
        gradient = torch.randn(numel, generator=generator)
        wanted = on_cpu.select(ChunkedVector([gradient]), residual, segments)
        quantized = quantize(bounded(wanted.values, segments, 1.0), "int2", segment_ks=ks)
        residual += gradient
        residual[wanted.indices] = torch.from_numpy(quantized.error(wanted.values))
        frame = encode_frame(numel, wanted.indices, quantized, in_tiles=True)
        mean = torch.zeros(numel)
        mean[wanted.indices] = quantized.decoded

        bucket = gradient.to(device, copy=True)
        report = torch.zeros(1, dtype=torch.int64, device=device)
        found = on_device.select(bucket, kept, segments)
        selected = DeviceSelected(bucket, kept, found, shape, bound)
        with arena.borrow(device) as scratch:
            written = write_frame(
                found, shape, bound, slots[0], scratch, has_residual=True, settings_digest=0,
                coherence=nothing,
            )  # fmt: skip
        with arena.borrow(device) as scratch:
            received = read_frames(
                slots, shape, check_frames(slots, shape, report), report, scratch
            )
            finish(selected, written, received, report, scratch, divisor=1)
        same = {
            "frames": torch.equal(slots[0, 32 : 32 + frame.numel()].cpu(), frame),
            "residuals": torch.equal(kept.cpu(), residual),
            "averages": torch.equal(bucket.cpu(), mean),
        }
        if not all(same.values()):
            wrong = ", ".join(name for name, is_same in same.items() if not is_same)
            raise RuntimeError(f"its {wrong} are not those of the CPU")

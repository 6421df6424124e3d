"""Where the engine on a device runs: on a GPU whose Triton can compile it, once it has been tried.

TOPQ_GPU=0 does without, as a machine without a GPU or without triton does. TOPQ_GPU=interpret is
for tests: with TRITON_INTERPRET=1 the kernels run on CPU tensors, by numpy, and slowly.
"""

from __future__ import annotations

import logging
import os
import threading
from functools import cache
from typing import TYPE_CHECKING

import torch

from topq_dist.compress.gpu.memory import Arena
from topq_dist.compress.layout import ChunkedVector
from topq_dist.compress.sparsify.segments import Segment, Segments, SegmentSelector

if TYPE_CHECKING:
    from topq_dist.compress.gpu.select import DeviceSelector

_log = logging.getLogger(__name__)
_TRYING = threading.Lock()
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
    """Raise unless the kernels compile for a device, and select there what the CPU does."""
    generator = torch.Generator().manual_seed(0)
    numels, ks = (20_000, 3, 9_000), (200, 1, 500)
    starts = (0, 20_000, 20_003)
    segments = Segments(
        Segment(start=start, rows=1, row_numel=numel, k=k)
        for start, numel, k in zip(starts, numels, ks, strict=True)
    )
    on_cpu, on_device = SegmentSelector(), make_selector(Arena())
    residual = torch.randn(sum(numels), generator=generator)
    for _ in range(3):
        gradient = torch.randn(sum(numels), generator=generator)
        wanted = on_cpu.select(ChunkedVector([gradient]), residual, segments)
        found = on_device.select(gradient.to(device), residual.to(device), segments)
        same = torch.equal(found.indices.cpu(), wanted.indices)
        if not same or not torch.equal(found.values.cpu(), wanted.values):
            raise RuntimeError("what it selects is not what the CPU does")

"""Waiting for a device, and having whatever does so unasked be an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def no_waits(device: torch.device, refused: bool) -> Iterator[None]:
    """Have whatever waits for the device within the block be an error, where that is asked for."""
    if device.type == "cuda" and refused:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")

"""Device memory: scratch that stages share one after the other, and copies without a wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_ALIGN_BYTES = 256


class Scratch:
    """What one borrower has of an arena's memory, and beside it where that is too little."""

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        self.used_bytes = 0

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Return so many elements of any content."""
        length = numel * dtype.itemsize
        start = self.used_bytes
        self.used_bytes = start + -(-length // _ALIGN_BYTES) * _ALIGN_BYTES
        if start + length > self._memory.numel():
            return torch.empty(numel, dtype=dtype, device=self._memory.device)
        return self._memory[start : start + length].view(dtype)

    def zeros(self, numel: int) -> Tensor:
        """Return so many zeros of int64."""
        return self.take(numel, torch.int64).zero_()


class Arena:
    """Scratch of one device for work of one stream, which runs in order: lent to one at a time.

    It grows to what the largest borrower has needed.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._needed_bytes = 0
        self._lent = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """How much memory it holds."""
        return self._memory.numel()

    @contextmanager
    def borrow(self, device: torch.device) -> Iterator[Scratch]:
        """Lend the scratch while work that uses it is being launched, in one thread at a time."""
        with self._lent:
            if self._memory.device != device or self._memory.numel() < self._needed_bytes:
                # first, or there would be two of them for a while
                self._memory = torch.empty(0, dtype=torch.uint8)
                self._memory = torch.empty(self._needed_bytes, dtype=torch.uint8, device=device)
            scratch = Scratch(self._memory)
            yield scratch
            self._needed_bytes = max(self._needed_bytes, scratch.used_bytes)

    def __getstate__(self) -> dict[str, object]:
        # a lock cannot be copied, and scratch need not be
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()  # type: ignore[misc]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on a device, through pinned memory and without waiting for the device."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)

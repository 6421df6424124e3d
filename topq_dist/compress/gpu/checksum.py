"""Tables for checksums on a device, see kernels/checksum.py."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from topq_dist.compress.gpu.memory import to_device

_POLYNOMIAL = 0xEDB88320
# digits in base 256 of a number of bytes below 2**32
DIGITS = 4


@cache
def tables_on(device: torch.device) -> Tensor:
    """Return the tables, int32, on a device."""
    shifts = _shifts()
    tables = np.concatenate([_bytes(), shifts.reshape(-1)])
    return to_device(torch.from_numpy(tables.view(np.int32)), device)


def _bytes() -> npt.NDArray[np.uint32]:
    """Return the checksum of each byte."""
    sums = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        sums = (sums >> np.uint32(1)) ^ np.where(sums & 1, _POLYNOMIAL, 0).astype(np.uint32)
    return sums


def _shifts() -> npt.NDArray[np.uint32]:
    """Return (DIGITS, 256, 32): column i is what a checksum of bit i becomes behind so many bytes.

    As many as digit * 256**place.
    """
    identity = np.uint32(1) << np.arange(32, dtype=np.uint32)
    table = _bytes()
    one = (identity >> np.uint32(8)) ^ table[identity & 255]
    places = []
    for _ in range(DIGITS):
        shifts = [identity]
        for _ in range(256):
            shifts.append(_times(one, shifts[-1]))
        places.append(np.stack(shifts[:256]))
        one = shifts[256]
    return np.stack(places)


def _times(outer: npt.NDArray[np.uint32], inner: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Return the columns of the product of two maps of 32 bits."""
    bits = inner[:, None] >> np.arange(32, dtype=np.uint32) & 1
    columns = np.where(bits == 1, outer[None, :], 0).astype(np.uint32)
    product: npt.NDArray[np.uint32] = np.bitwise_xor.reduce(columns, axis=1)
    return product

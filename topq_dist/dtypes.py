"""Float dtypes: one table of what is known of each, and the bits, sums and casts that follow.

A number's magnitude is its bit pattern with the sign cleared: as integers these keys order as the
magnitudes do, exactly, with infinity above every number, NaN above infinity and denormals whole.
"""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Keys = npt.NDArray[np.unsignedinteger[Any]]
Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating[Any]]


class FloatKind(NamedTuple):
    """What is known of one float dtype.

    value_format: the format of a frame that holds its values whole. key: its bit patterns, as
    numpy's unsigned integers. signed: the same as torch's integers, which are signed. accumulate:
    what its gradients are added up in, and its residual.
    """

    value_format: str
    key: type[np.unsignedinteger[Any]]
    signed: torch.dtype
    accumulate: torch.dtype


FLOATS: dict[torch.dtype, FloatKind] = {
    torch.float16: FloatKind("fp16", np.uint16, torch.int16, torch.float32),
    torch.bfloat16: FloatKind("bf16", np.uint16, torch.int16, torch.float32),
    torch.float32: FloatKind("fp32", np.uint32, torch.int32, torch.float32),
    torch.float64: FloatKind("fp64", np.uint64, torch.int64, torch.float64),
}


def is_plain(tensor: Tensor) -> bool:
    """Return whether this is dense numbers in memory.

    Not so are DTensor and other classes that dispatch for themselves, tensors on the meta device,
    quantized ones, and those of another layout.
    """
    return (
        type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
        and tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_quantized
    )


def local_part(tensor: Tensor) -> Tensor:
    """Return what of a DTensor lies in this process, sharing its memory; others as they are."""
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    part: Tensor = to_local()
    return part


def check_plain(name: str, tensor: Tensor) -> None:
    """Raise TypeError, naming it and saying what to do, unless `is_plain`."""
    if is_plain(tensor):
        return
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise TypeError(
            f"{name} is a {type(tensor).__name__}: expected a plain tensor, so give what its "
            "to_local() returns, or full_tensor() where all of it is meant"
        )
    if tensor.is_quantized:
        raise TypeError(f"{name} is quantized ({tensor.dtype}): expected what dequantize() returns")
    raise TypeError(
        f"{name} has layout {tensor.layout} on {tensor.device}: expected a dense tensor with data, "
        f"so give it {'memory with to_empty()' if tensor.is_meta else 'as to_dense()'}"
    )


def bits_of(vector: Tensor) -> Keys:
    """Return the bit patterns of a contiguous CPU float tensor, sharing its memory."""
    kind = FLOATS[vector.dtype]
    return vector.detach().view(kind.signed).numpy().view(kind.key)


def tensor_of(bits: Keys, dtype: torch.dtype) -> Tensor:
    """Return the numbers of these bit patterns, sharing their memory."""
    return torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(dtype)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what gradients of this dtype are added up in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sign_cleared(dtype: torch.dtype) -> np.unsignedinteger[Any]:
    """Return the mask that clears the sign bit of a bit pattern."""
    return FLOATS[dtype].key((1 << (dtype.itemsize * 8 - 1)) - 1)


def number_of(key: int, dtype: torch.dtype) -> float:
    """Return the magnitude that a key stands for."""
    bits = np.uint64(key) if dtype == torch.float64 else np.uint32(key)
    if dtype == torch.float16:
        return float(np.uint16(key).view(np.float16))
    if dtype == torch.bfloat16:
        bits <<= np.uint32(16)
    return float(bits.view(f"f{bits.itemsize}"))


def key_of(magnitude: float, dtype: torch.dtype) -> int:
    """Return the key of a magnitude in this dtype; between two of bf16, the lower."""
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            return int(np.float16(magnitude).view(np.uint16))
    # struct, which takes a tenth of numpy's time: this is asked once a tensor
    if dtype == torch.float64:
        return int.from_bytes(struct.pack("<d", magnitude), "little")
    try:
        pattern = struct.pack("<f", magnitude)
    except OverflowError:
        pattern = struct.pack("<f", math.inf)
    key = int.from_bytes(pattern, "little")
    return key >> 16 if dtype == torch.bfloat16 else key


# numpy has no bf16 and converts fp16 one number at a time, so torch does it; but a torch operation
# on more elements wakes torch's threads, and to wait for those costs more than the work
_SERIAL_NUMEL = 32_768


def cast(source: Tensor, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    """Return 1-D `source` rounded to `dtype`, in `out` where that, of the same length, is given."""
    result = torch.empty(source.shape, dtype=dtype) if out is None else out
    if torch.get_num_threads() == 1:
        return result.copy_(source)
    for at in range(0, source.numel(), _SERIAL_NUMEL):
        result[at : at + _SERIAL_NUMEL].copy_(source[at : at + _SERIAL_NUMEL])
    return result


def zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `numel` zeros of fp32 or fp64, in huge pages where the system has them."""
    if device.type != "cpu":
        return torch.zeros(numel, dtype=dtype, device=device)
    # numpy asks the system for huge pages, which torch does not
    return torch.from_numpy(np.zeros(numel, np.float64 if dtype == torch.float64 else np.float32))

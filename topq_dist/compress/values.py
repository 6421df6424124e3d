"""Value formats: fp64 and fp32 as they are, fp16 and bf16 rounded, 8, 4 and 2 bits with scales.

Every encoder also returns the decoded values, so that the caller can keep the rounding error.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from topq_dist.compress.bits import Bytes
from topq_dist.compress.lowbit import decode_blocks, encode_blocks, lowbit_bytes

VALUE_FORMATS = ("fp32", "fp16", "bf16", "int8", "int4", "int2", "fp64")
_WHOLE = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
_LOW_BITS = {"int8": 8, "int4": 4, "int2": 2}
# scaled magnitudes are at most 2**15, clear of fp16's 65504; 2**126 is still normal in fp32, and so
# is its inverse
_FP16_TOP_EXPONENT = 15
_LOWEST_EXPONENT = -126
# the largest fp16 number below 2**15, times 2**113; above it rounding would end at 2**128
_FP16_LARGEST = 32752.0 * 2.0**113


class EncodedValues(NamedTuple):
    """A payload, the power of two that it is scaled by, and the values a receiver will see."""

    payload: Bytes
    exponent: int
    decoded: Tensor


def check_value_format(value_format: str) -> str:
    """Return `value_format`, or raise ValueError naming it unless it is one of VALUE_FORMATS."""
    if value_format not in VALUE_FORMATS:
        raise ValueError(f"value_format={value_format!r}: expected one of {VALUE_FORMATS}")
    return value_format


def decoded_dtype(value_format: str) -> torch.dtype:
    """Return the dtype of decoded values: fp64 for "fp64", else fp32."""
    return torch.float64 if value_format == "fp64" else torch.float32


def payload_bytes(count: int, value_format: str) -> int:
    """Return the bytes that `count` values take in this format, block scales included."""
    if value_format in _WHOLE:
        return count * _WHOLE[value_format].itemsize
    if value_format == "fp16":
        return count * 2
    return lowbit_bytes(count, _LOW_BITS[value_format])


def encode_values(values: Tensor, value_format: str) -> EncodedValues:
    """Encode finite `values`, a 1-D CPU tensor of any float dtype.

    A finite value that the format cannot hold becomes the largest that it can. "fp16" is scaled by
    one power of two, chosen from the largest magnitude, so that neither large nor tiny gradients
    leave its range.
    """
    if not values.numel():
        return EncodedValues(np.zeros(0, np.uint8), 0, values.to(decoded_dtype(value_format)))
    exponent = 0
    if value_format == "fp64":
        stored = decoded = values.double()
    elif value_format == "fp16":
        single = _to_single(values).clamp(-_FP16_LARGEST, _FP16_LARGEST)
        exponent = _fp16_exponent(single)
        stored = (single * 2.0**-exponent).half()
        decoded = stored.float().mul_(2.0**exponent)
    elif value_format in _WHOLE:
        single = _to_single(values)
        dtype = _WHOLE[value_format]
        largest = torch.finfo(dtype).max
        stored = single if dtype == torch.float32 else single.clamp(-largest, largest).to(dtype)
        decoded = stored.float()
    else:
        payload, levels = encode_blocks(_to_single(values).numpy(), _LOW_BITS[value_format])
        return EncodedValues(payload, 0, torch.from_numpy(levels))
    return EncodedValues(stored.contiguous().view(torch.uint8).numpy(), exponent, decoded)


def decode_values(payload: Bytes, count: int, value_format: str, exponent: int) -> Tensor:
    """Return the `count` values of `payload`, fp32 (fp64 for "fp64"), in memory of their own."""
    if not count:
        return torch.zeros(0, dtype=decoded_dtype(value_format))
    if value_format in _LOW_BITS:
        return torch.from_numpy(decode_blocks(payload, count, _LOW_BITS[value_format]))
    dtype = torch.float16 if value_format == "fp16" else _WHOLE[value_format]
    # a copy: the payload may be unaligned, and read-only
    stored = torch.from_numpy(np.array(payload)).view(dtype)
    decoded = stored.to(decoded_dtype(value_format))
    return decoded.mul_(2.0**exponent) if exponent else decoded


def exponent_is_valid(value_format: str, exponent: int) -> bool:
    """Return whether encode_values could have chosen this exponent."""
    if value_format == "fp16":
        return _LOWEST_EXPONENT <= exponent <= 128 - _FP16_TOP_EXPONENT
    return exponent == 0


def _to_single(values: Tensor) -> Tensor:
    if values.dtype == torch.float64:
        largest = torch.finfo(torch.float32).max
        return values.clamp(-largest, largest).float()
    return values.float()


def _fp16_exponent(single: Tensor) -> int:
    peak = float(single.abs().max())
    if peak == 0.0:
        return 0
    return max(int(np.frexp(peak)[1]) - _FP16_TOP_EXPONENT, _LOWEST_EXPONENT)

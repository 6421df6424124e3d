"""Value formats: fp64 and fp32 as they are, fp16 and bf16 rounded, 8, 4 and 2 bits with scales.

"ec1" and "ec2", of 1 to 2 bits, and "ecfp16" and "ecbf16" are entropy-coded (coded.py).

Quantized values know what they decode to, so that the caller can keep the rounding error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from topq_dist.compress.codec.bits import Bytes
from topq_dist.compress.codec.coded import (
    LEVELS_BLOCK_NUMEL,
    STEP_RATIOS,
    Halves,
    decode_halves,
    decode_levels,
    encode_halves,
    encode_levels,
    most_halves_bytes,
    most_levels_bytes,
)
from topq_dist.compress.codec.lowbit import (
    BLOCK_NUMEL,
    Counts,
    decode_blocks,
    encode_blocks,
    lowbit_bytes,
)
from topq_dist.compress.kernels import round_to_half, widen_half
from topq_dist.dtypes import FLOATS, accumulate_dtype, cast

VALUE_FORMATS = (
    *("fp32", "fp16", "bf16", "int8", "int4", "int2", "fp64"),
    *("ec1", "ec2", "ecfp16", "ecbf16"),
)
WHOLE = {kind.value_format: dtype for dtype, kind in reversed(FLOATS.items())}
LOW_BITS = {"int8": 8, "int4": 4, "int2": 2}
# of how many bytes a payload is, its header says
CODED = ("ec1", "ec2", "ecfp16", "ecbf16")
# how many values share scales, in formats that have them, whose blocks begin anew with segments
BLOCK_NUMELS = dict.fromkeys(LOW_BITS, BLOCK_NUMEL) | dict.fromkeys(STEP_RATIOS, LEVELS_BLOCK_NUMEL)
# scaled magnitudes are at most 2**15, clear of fp16's 65504; 2**126 is still normal in fp32, and so
# is its inverse
_FP16_TOP_EXPONENT = 15
_LOWEST_EXPONENT = -126
_HIGHEST_EXPONENT = 128 - _FP16_TOP_EXPONENT
# above these rounding would end at infinity; the others go through fp32
_LARGEST_FP32 = float(np.finfo(np.float32).max)
_LARGEST = {
    **dict.fromkeys(("fp16", "ecfp16"), 32752.0 * 2.0**_HIGHEST_EXPONENT),
    **dict.fromkeys(("bf16", "ecbf16"), torch.finfo(torch.bfloat16).max),
}


class Quantized(NamedTuple):
    """Values as a frame holds them.

    payload: their bytes. exponent: the power of two that they are scaled by. decoded: the values
    that a receiver will see, fp32, or fp64 for "fp64". segment_ks: how many of them each segment
    has that has any, where the format asks and there are several.
    """

    value_format: str
    payload: Bytes
    exponent: int
    decoded: Tensor
    segment_ks: Counts | None = None

    def error(self, values: Tensor) -> npt.NDArray[np.floating]:
        """Return `values`, on the CPU, less what a receiver will see of them, in their dtype."""
        # numpy, since torch would wake its threads
        wide = values.numpy()
        rest: npt.NDArray[np.floating] = wide - self.decoded.numpy()
        # "fp64" decodes to more than narrower values need
        return rest.astype(wide.dtype, copy=False)


class _Encoded(NamedTuple):
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
    return accumulate_dtype(WHOLE.get(value_format, torch.float32))


def payload_bytes(count: int, value_format: str, *, blocks: int | None = None) -> int:
    """Return the bytes that `count` values take in this format, block scales included.

    Of the formats of CODED, the most that they may take.
    blocks: how many there are of those; None: as few as can be, for the values of one segment.
    """
    if value_format in BLOCK_NUMELS and blocks is None:
        blocks = -(-count // BLOCK_NUMELS[value_format])
    if value_format in LOW_BITS:
        return lowbit_bytes(count, LOW_BITS[value_format], blocks or 0)
    if value_format in STEP_RATIOS:
        return most_levels_bytes(count, blocks or 0)
    if value_format in CODED:
        return most_halves_bytes(count)
    return count * WHOLE[value_format].itemsize


def quantize(
    values: Tensor,
    value_format: str = "fp32",
    *,
    segment_ks: Sequence[int] | Counts | None = None,
) -> Quantized:
    """Round `values`, a 1-D tensor of any float dtype, to a format.

    segment_ks: how many of them each segment of the vector has, in order: the blocks of
        BLOCK_NUMELS' formats begin anew with each, so that its values are rounded as if they were
        alone. None: the vector is one segment.

    A finite value that the format cannot hold becomes the largest that it can. "fp16" is scaled by
    one power of two, chosen from the largest magnitude, so that neither large nor tiny gradients
    leave its range. Raises ValueError for an unknown format, values that are no floats or not
    finite (see encode_non_finite_frame), and segments that are not of as many values.
    """
    check_value_format(value_format)
    if not values.dtype.is_floating_point:
        raise ValueError(f"values has dtype {values.dtype}: expected a float dtype")
    ks = None if segment_ks is None else _several(segment_ks, values.numel(), value_format)
    payload, exponent, decoded = _encode(values.detach().cpu(), value_format, ks)
    return Quantized(value_format, payload, exponent, decoded, ks)


def _several(segment_ks: Sequence[int] | Counts, k: int, value_format: str) -> Counts | None:
    """Return how many values each segment has that has any; None where nothing hangs on it."""
    ks = np.asarray(segment_ks, np.int64, order="C")
    least = ks.min(initial=1)
    if ks.ndim != 1 or least < 0 or ks.sum() != k:
        raise ValueError(
            f"segment_ks of shape {ks.shape} and sum {ks.sum()}: expected a sum of {k}"
        )
    if least == 0:
        ks = ks[ks > 0]
    return ks if value_format in BLOCK_NUMELS and ks.size > 1 else None


def _encode(values: Tensor, value_format: str, segment_ks: Counts | None) -> _Encoded:
    wide = _as_floats(values, accumulate_dtype(values.dtype))
    # NaN is the maximum of what holds one, and no absolute values need room
    peak = max(float(wide.max()), -float(wide.min())) if wide.size else 0.0
    if not math.isfinite(peak):
        raise ValueError("values holds NaN or infinity: expected finite numbers")
    if value_format == "fp64":
        exact = wide.astype(np.float64)
        return _Encoded(exact.view(np.uint8), 0, torch.from_numpy(exact))
    largest = _LARGEST.get(value_format, _LARGEST_FP32)
    if peak > largest:
        wide, peak = np.clip(wide, -largest, largest), largest
    if value_format in ("fp16", "ecfp16"):
        halved = _encode_half(wide.astype(np.float32, copy=False), _fp16_exponent(peak))
        return halved if value_format == "fp16" else _coded(halved, rotated=False)
    if value_format in BLOCK_NUMELS:
        single = wide.astype(np.float32, copy=False)
        ks = _one_segment(single.size) if segment_ks is None else segment_ks
        if value_format in LOW_BITS:
            payload, levels = encode_blocks(single, LOW_BITS[value_format], ks)
        else:
            payload, levels = encode_levels(single, STEP_RATIOS[value_format], ks)
        return _Encoded(payload, 0, torch.from_numpy(levels))
    # a copy even where nothing is rounded: what is decoded must not change with `values`
    single = wide.astype(np.float32)
    if value_format == "fp32":
        return _Encoded(single.view(np.uint8), 0, torch.from_numpy(single))
    stored = cast(torch.from_numpy(single), torch.bfloat16)
    payload = stored.view(torch.int16).numpy().view(np.uint8)
    rounded = _Encoded(payload, 0, cast(stored, torch.float32))
    return rounded if value_format == "bf16" else _coded(rounded, rotated=True)


def _coded(halved: _Encoded, *, rotated: bool) -> _Encoded:
    payload = encode_halves(halved.payload.view(np.uint16), rotated=rotated)
    return halved._replace(payload=payload)


def decode_values(
    payload: Bytes,
    count: int,
    value_format: str,
    exponent: int,
    *,
    segment_ks: Counts | None = None,
    in_place: bool = False,
) -> Tensor:
    """Return the `count` values of `payload`, fp32 (fp64 for "fp64"), in memory of their own.

    segment_ks: as it was quantized with.
    in_place: the caller leaves `payload` to the values, which are then a view of it where that can
        be. Raises ValueError where one is NaN or infinite, or padding bits are not zero.
    """
    if value_format in BLOCK_NUMELS:
        ks = _one_segment(count) if segment_ks is None else segment_ks
        if value_format in LOW_BITS:
            # finite, or it has been refused
            return torch.from_numpy(decode_blocks(payload, count, LOW_BITS[value_format], ks))
        decoded = torch.from_numpy(decode_levels(payload, count, ks))
    elif value_format in ("fp64", "fp32"):
        number = np.dtype(np.float64 if value_format == "fp64" else np.float32)
        aligned = payload.ctypes.data % number.alignment == 0
        own = payload if in_place and aligned and payload.flags.writeable else payload.copy()
        decoded = torch.from_numpy(own.view(number))
    else:
        coded, rotated = value_format in CODED, value_format == "ecbf16"
        halves = (
            decode_halves(payload, count, rotated=rotated)
            if coded
            else payload.copy().view(np.uint16)
        )
        if value_format in ("fp16", "ecfp16"):
            return _widened(halves, exponent)
        decoded = cast(torch.from_numpy(halves.view(np.int16)).view(torch.bfloat16), torch.float32)
    if count and not (np.isfinite(decoded.numpy().max()) and np.isfinite(decoded.numpy().min())):
        raise ValueError("a value is not finite")
    return decoded


def _widened(halves: Halves, exponent: int) -> Tensor:
    widened = np.empty(halves.size, np.float32)
    if not widen_half(halves, np.float32(2.0**exponent), widened, widened.view(np.int32)):
        raise ValueError("a value is not finite")
    return torch.from_numpy(widened)


def exponent_is_valid(value_format: str, exponent: int) -> bool:
    """Return whether quantize could have chosen this exponent."""
    if value_format in ("fp16", "ecfp16"):
        return _LOWEST_EXPONENT <= exponent <= _HIGHEST_EXPONENT
    return exponent == 0


def _one_segment(count: int) -> Counts:
    return np.array([count], np.int64)


def _as_floats(values: Tensor, dtype: torch.dtype) -> npt.NDArray[np.floating]:
    values = values.detach().contiguous()
    return (values if values.dtype == dtype else cast(values, dtype)).numpy()


def _encode_half(values: npt.NDArray[np.float32], exponent: int) -> _Encoded:
    scratch, halves = np.empty_like(values), np.empty(values.size, np.uint16)
    bits = scratch.view(np.int32)
    round_to_half(values, np.float32(2.0**-exponent), scratch, bits, halves)
    widen_half(halves, np.float32(2.0**exponent), scratch, bits)
    return _Encoded(halves.view(np.uint8), exponent, torch.from_numpy(scratch))


def _fp16_exponent(peak: float) -> int:
    if peak == 0.0:
        return 0
    return max(int(np.frexp(peak)[1]) - _FP16_TOP_EXPONENT, _LOWEST_EXPONENT)

"""fp16 in compiled loops: rounded to and widened as IEEE 754 says, scaled by a power of two.

torch does the same; called on a cache that a gradient has just gone through, it takes many times as
long to come to it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from topq_dist.compress.machine_code import compiled

# all of 32 bits: with Python's integers the loops would count in 64, half as many at a time
_ONE, _SIGN_SHIFT, _SIGN, _INFINITY = (np.int32(n) for n in (1, 16, 0x8000, 0x7C00))
_MAGNITUDE, _MANTISSA, _LEADING = (np.int32(n) for n in (0x7FFFFFFF, 0x7FFFFF, 1 << 23))
# exponents of fp32 are biased by 127, those of fp16 by 15; fp32 has 13 more bits of mantissa
_REBIAS, _SHIFT, _ROUNDING = (np.int32(n) for n in ((127 - 15) << 23, 13, 0xFFF))
_EXPONENT_SHIFT, _LARGEST_SHIFT, _UNIT_EXPONENT = (np.int32(n) for n in (23, 25, 126))
_SMALLEST_NORMAL_HALF = np.int32(1 << 10)
_LARGEST = np.finfo(np.float32).max


@compiled
def round_to_half(numbers: Any, scale: Any, scaled: Any, bits: Any, halves: Any) -> None:
    """halves = the bits of fp16(numbers * scale), ties to even; the products are below 65520.

    `scaled` is scratch of fp32, `bits` the same memory as int32, `halves` uint16.
    """
    for at in range(numbers.size):
        scaled[at] = numbers[at] * scale
    for at in range(bits.size):
        sign = (bits[at] >> _SIGN_SHIFT) & _SIGN
        magnitude = bits[at] & _MAGNITUDE
        odd = (magnitude >> _SHIFT) & _ONE
        normal = (magnitude - _REBIAS + _ROUNDING + odd) >> _SHIFT
        # below the normal numbers the mantissa, its leading one written out, counts units of 2**-24
        mantissa = (magnitude & _MANTISSA) | _LEADING
        shift = _UNIT_EXPONENT - (magnitude >> _EXPONENT_SHIFT)
        shift = min(_LARGEST_SHIFT, shift)
        shift = max(_ONE, shift)
        odd = (mantissa >> shift) & _ONE
        tiny = (mantissa + (_ONE << (shift - _ONE)) - _ONE + odd) >> shift
        halves[at] = sign | (normal if magnitude >= _REBIAS + _LEADING else tiny)


@compiled
def widen_half(halves: Any, scale: Any, widened: Any, bits: Any) -> Any:
    """widened = fp32(halves) * scale; returns False where a number is not finite.

    `halves` is uint16, `widened` fp32 and `bits` the same memory as int32.
    """
    finite = True
    for at in range(halves.size):
        magnitude = np.int32(halves[at]) & (_SIGN - _ONE)
        finite &= magnitude < _INFINITY
        # numbers below the normal ones get a leading one that is taken off again
        leading = _LEADING if magnitude < _SMALLEST_NORMAL_HALF else np.int32(0)
        bits[at] = (magnitude << _SHIFT) + _REBIAS + leading
    for at in range(halves.size):
        half = np.int32(halves[at])
        leading = np.float32(2.0**-14) if half & _INFINITY == 0 else np.float32(0.0)
        number = (widened[at] - leading) * scale
        finite &= number <= _LARGEST
        widened[at] = -number if half & _SIGN else number
    return finite

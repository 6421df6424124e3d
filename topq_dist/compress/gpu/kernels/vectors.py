"""gradient + residual as bit patterns; what the other kernels are made of."""

import triton
import triton.language as tl

# of a gradient's dtype
FP16 = tl.constexpr(0)
BF16 = tl.constexpr(1)
FP32 = tl.constexpr(2)
FP64 = tl.constexpr(3)


@triton.jit
def sum_bits(gradient, residual, at, mask, KIND: tl.constexpr, HAS_RESIDUAL: tl.constexpr):
    """The bit patterns of gradient + residual, or of the gradient alone, zero beside the mask.

    int64 of fp64, else int32.
    """
    bits = tl.load(gradient + at, mask=mask, other=0)
    if HAS_RESIDUAL:
        kept = tl.load(residual + at, mask=mask, other=0)
        if KIND == FP64:
            total = bits.to(tl.float64, bitcast=True) + kept.to(tl.float64, bitcast=True)
            result = total.to(tl.int64, bitcast=True)
        else:
            total = widened(bits, KIND) + kept.to(tl.float32, bitcast=True)
            result = total.to(tl.int32, bitcast=True)
    elif KIND == FP64:
        result = bits
    else:
        result = bits.to(tl.int32)
    return result


@triton.jit
def widened(bits, KIND: tl.constexpr):
    """The fp32 numbers of patterns of fp16, bf16 or fp32."""
    if KIND == FP16:
        number = bits.to(tl.float16, bitcast=True).to(tl.float32)
    elif KIND == BF16:
        number = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        number = bits.to(tl.float32, bitcast=True)
    return number


@triton.jit
def key_of(bits, KEY_BITS: tl.constexpr):
    """The magnitudes of bit patterns, as integers that order as the magnitudes do."""
    if KEY_BITS == 63:
        key = bits & 0x7FFFFFFFFFFFFFFF
    elif KEY_BITS == 31:
        key = bits & 0x7FFFFFFF
    else:
        key = bits & 0x7FFF
    return key


@triton.jit
def number_of(key, KEY_BITS: tl.constexpr, KIND: tl.constexpr):
    """The magnitude of a key in fp32, about."""
    if KEY_BITS == 63:
        number = key.to(tl.float64, bitcast=True).to(tl.float32)
    elif KEY_BITS == 31:
        number = key.to(tl.int32).to(tl.float32, bitcast=True)
    else:
        number = widened(key.to(tl.int16), KIND)
    return number


@triton.jit
def key_of_number(number, KEY_BITS: tl.constexpr, KIND: tl.constexpr):
    """The key of a magnitude in fp32, about."""
    if KEY_BITS == 63:
        key = number.to(tl.float64).to(tl.int64, bitcast=True)
    elif KEY_BITS == 31:
        key = number.to(tl.int32, bitcast=True).to(tl.int64)
    elif KIND == FP16:
        key = number.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int64)
    else:
        key = number.to(tl.int32, bitcast=True).to(tl.int64) >> 16
    return key

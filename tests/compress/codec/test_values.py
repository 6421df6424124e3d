import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from topq_dist.compress.codec.values import (
    CODED,
    VALUE_FORMATS,
    check_value_format,
    decode_values,
    payload_bytes,
    quantize,
)

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
SINGLES = hnp.arrays(np.float32, st.integers(0, 300), elements=FINITE)


def heavy_tail(numel: int) -> Tensor:
    """The top k of a normal gradient: magnitudes above a threshold, both signs."""
    normal = torch.randn(numel * 100, generator=torch.Generator().manual_seed(1))
    return normal[normal.abs().topk(numel).indices.sort().values]


@given(values=SINGLES, value_format=st.sampled_from(VALUE_FORMATS))
@settings(max_examples=500, deadline=None)
def test_what_is_decoded_is_what_the_encoder_said(values: np.ndarray, value_format: str) -> None:
    quantized = quantize(torch.from_numpy(values), value_format)
    payload, exponent, decoded = quantized.payload, quantized.exponent, quantized.decoded
    most = payload_bytes(values.size, value_format)
    assert payload.size <= most if value_format in CODED else payload.size == most
    again = decode_values(payload, values.size, value_format, exponent)
    assert again.dtype == decoded.dtype
    assert again.numpy().tobytes() == decoded.numpy().tobytes()
    assert bool(torch.isfinite(again).all())
    if value_format in ("fp32", "fp64"):
        assert torch.equal(decoded, torch.from_numpy(values).to(decoded.dtype))
    else:
        # what goes to the residual is never more than what came in
        rest = torch.from_numpy(values) - decoded
        peak = float(np.abs(values).max(initial=0.0))
        assert float(rest.abs().max() if values.size else 0.0) <= peak


@pytest.mark.parametrize(
    ("value_format", "most_error"),
    [
        *[("fp16", 2.0**-11), ("bf16", 2.0**-8), ("int8", 0.003), ("int4", 0.04), ("int2", 0.08)],
        *[("ec1", 0.08), ("ec2", 0.05), ("ecfp16", 2.0**-11), ("ecbf16", 2.0**-8)],
    ],
)
def test_relative_error_of_the_tail_of_a_normal(value_format: str, most_error: float) -> None:
    values = heavy_tail(10_000)
    decoded = quantize(values, value_format).decoded
    assert float((decoded - values).norm() / values.norm()) <= most_error
    assert bool((decoded.sign() == values.sign()).all())


@pytest.mark.parametrize("scale", [1e-33, 1e-20, 1e-8, 1e8, 1e20, 1e36])
@pytest.mark.parametrize("value_format", VALUE_FORMATS)
def test_no_scale_of_gradients_costs_precision(scale: float, value_format: str) -> None:
    values = heavy_tail(1000).double()

    def relative_error(factor: float) -> float:
        decoded = quantize((values * factor).float(), value_format).decoded.double()
        return float((decoded - values * factor).norm() / (values * factor).norm())

    # a factor that is no power of two shifts where in a binade the values lie
    assert relative_error(scale) <= 2.0 * relative_error(1.0) + 1e-7


@pytest.mark.parametrize("value_format", VALUE_FORMATS)
def test_the_largest_numbers_stay_finite(value_format: str) -> None:
    largest = torch.finfo(torch.float32).max
    for dtype, top in ((torch.float32, largest), (torch.float64, 1e300)):
        values = torch.tensor([top, -top, largest / 2, 1.0], dtype=dtype)
        decoded = quantize(values, value_format).decoded
        assert bool(torch.isfinite(decoded).all())
        assert bool((decoded.double().abs() <= values.double().abs().max() * 1.01).all())
        assert float(decoded[0]) > 1e38
        assert float(decoded[1]) < -1e38


def test_the_smallest_numbers_survive_in_fp16() -> None:
    values = torch.tensor([1e-45, -3e-45, 2.0**-133, 0.0])
    assert torch.equal(quantize(values, "fp16").decoded, values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradients_of_a_dtype_survive_in_its_own_format(dtype: torch.dtype) -> None:
    own = {
        torch.float16: "fp16",
        torch.bfloat16: "bf16",
        torch.float32: "fp32",
        torch.float64: "fp64",
    }
    values = (torch.randn(1000, generator=torch.Generator().manual_seed(2)) * 3.0).to(dtype)
    decoded = quantize(values, own[dtype]).decoded
    assert torch.equal(decoded.double(), values.double())


def test_bits_a_value_with_scales() -> None:
    for count in (1_000, 65_536, 255_600):
        assert payload_bytes(count, "int8") * 8 / count <= 9.0
        assert payload_bytes(count, "int4") * 8 / count <= 4.5
        assert payload_bytes(count, "int2") * 8 / count <= 2.3


@pytest.mark.parametrize(("coded", "plain"), [("ecfp16", "fp16"), ("ecbf16", "bf16")])
def test_coded_halves_are_the_same_numbers_in_fewer_bits(coded: str, plain: str) -> None:
    values = heavy_tail(20_000)
    some, all_of_it = quantize(values, coded), quantize(values, plain)
    assert torch.equal(some.decoded, all_of_it.decoded)
    assert some.exponent == all_of_it.exponent
    assert some.payload.size < 0.7 * all_of_it.payload.size


def test_two_bits_keep_the_sum_of_magnitudes_of_each_block() -> None:
    values = heavy_tail(1280)
    decoded = quantize(values, "int2").decoded
    blocks, kept = values.view(-1, 128).abs(), decoded.view(-1, 128).abs()
    # base and step are bf16
    assert torch.allclose(kept.mean(1), blocks.mean(1), rtol=0.02)


def test_decoded_values_do_not_change_with_the_input() -> None:
    for value_format in VALUE_FORMATS:
        values = torch.ones(5)
        encoded = quantize(values, value_format)
        values.zero_()
        assert bool((encoded.decoded == 1.0).all())
        assert bool((decode_values(encoded.payload, 5, value_format, encoded.exponent) == 1).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("value_format", VALUE_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_what_is_not_finite_is_refused(bad: float, value_format: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="values holds NaN or infinity"):
        quantize(torch.tensor([1.0, bad], dtype=dtype), value_format)


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(ValueError, match="value_format='fp13': expected one of"):
        check_value_format("fp13")


@pytest.mark.parametrize("value_format", ["fp32", "fp64"])
def test_values_in_place_are_a_view_where_that_can_be(value_format: str) -> None:
    values = torch.tensor([1.5, -2.0, 3.25], dtype=torch.float64)
    payload = quantize(values, value_format).payload
    room = np.zeros(payload.size + 8, dtype=np.uint8)
    for offset, shared in ((0, True), (1, False)):
        raw = room[offset : offset + payload.size]
        raw[:] = payload
        decoded = decode_values(raw, 3, value_format, 0, in_place=True)
        assert decoded.tolist() == values.tolist()
        raw[:] = 0
        assert decoded.any() == (not shared)
    raw = np.frombuffer(payload.tobytes(), dtype=np.uint8)  # read-only
    decoded = decode_values(raw, 3, value_format, 0, in_place=True)
    decoded.zero_()
    assert raw.any()
    for wrong in (np.nan, np.inf, -np.inf):
        room[: payload.size] = payload
        whole = room[: payload.size].view(np.float64 if value_format == "fp64" else np.float32)
        whole[1] = wrong
        with pytest.raises(ValueError, match="not finite"):
            decode_values(room[: payload.size], 3, value_format, 0, in_place=True)

"""Entropy-coded values beside those of fixed width: their error, their bits, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fuzz_frames import seal
from torch import Tensor

from topq_dist.compress.codec.coded import decode_halves, decode_levels, encode_levels
from topq_dist.compress.codec.frame import (
    HEADER_BYTES,
    FrameError,
    decode_frame,
    encode_frame,
    encode_non_finite_frame,
    peek_header,
)
from topq_dist.compress.codec.values import CODED, decode_values, quantize

K = 20_000


def selected(kind: str) -> Tensor:
    """Return the 2 % of largest magnitude of a vector of this distribution."""
    generator = np.random.default_rng(3)
    draws = {
        "normal": generator.standard_normal(50 * K),
        "Laplace": generator.laplace(size=50 * K),
        "Student's t": generator.standard_t(3, 50 * K),
    }
    vector = draws[kind].astype(np.float32)
    cut = np.partition(np.abs(vector), -K)[-K]
    return torch.from_numpy(vector[np.abs(vector) >= cut][:K])


def error_and_bits(values: Tensor, value_format: str) -> tuple[float, float]:
    quantized = quantize(values, value_format)
    wide = values.double()
    error = float((quantized.decoded.double() - wide).square().sum() / wide.square().sum())
    return error, quantized.payload.size * 8 / values.numel()


@pytest.mark.parametrize("kind", ["normal", "Laplace", "Student's t"])
def test_half_the_error_at_the_same_bits_or_fewer_bits_at_the_same_error(kind: str) -> None:
    values = selected(kind)
    error, bits = error_and_bits(values, "int2")
    better, as_many = error_and_bits(values, "ec2")
    assert better < 0.5 * error
    assert as_many < 1.01 * bits
    alike, fewer = error_and_bits(values, "ec1")
    assert alike < 1.1 * error
    assert fewer < 0.77 * bits


def test_values_of_one_bound_take_two_levels_or_one() -> None:
    values = selected("Laplace")
    bound = float(values.abs().mean())
    bounded = values.clamp(-bound, bound)
    error, bits = error_and_bits(bounded, "int2")
    alike, fewer = error_and_bits(bounded, "ec2")
    assert alike < 1.1 * error
    assert fewer < 0.92 * bits
    # a sign and a mean, of the magnitudes between the threshold and their mean
    alone, fewest = error_and_bits(bounded, "ec1")
    assert alone < error_and_bits(values, "int2")[0]
    assert fewest < 1.02


@pytest.mark.parametrize("value_format", ["ec1", "ec2"])
def test_the_sum_of_magnitudes_stays(value_format: str) -> None:
    values = selected("Laplace").double()
    decoded = quantize(values, value_format).decoded.double()
    assert float(decoded.abs().sum() / values.abs().sum()) == pytest.approx(1.0, abs=2e-3)


def test_a_single_value_is_as_exact_as_bf16_and_few_take_few_bytes() -> None:
    quantized = quantize(torch.tensor([-3.14159]), "ec2")
    assert quantized.decoded.tolist() == [-3.140625]
    assert quantized.payload.size == 5
    two = quantize(torch.tensor([1.0, -2.0]), "ec2")
    assert two.decoded.tolist() == [1.0, -2.0]
    # values of which nothing is known are each a segment
    assert quantize(torch.ones(9), "ec1", segment_ks=[1] * 9).payload.size == 9 * 2 + 2 + 2


@pytest.mark.parametrize("value_format", CODED)
def test_frames_say_how_long_their_values_are(value_format: str) -> None:
    values, at = selected("normal")[:3000], torch.arange(3000) * 7
    quantized = quantize(values, value_format)
    frame = encode_frame(21_000, at, quantized)
    header = peek_header(frame)
    assert header.value_bytes == quantized.payload.size
    assert header.header_bytes == HEADER_BYTES + 4
    assert decode_frame(frame, numel=21_000).values.tolist() == quantized.decoded.tolist()
    raw = frame.numpy().tobytes()
    for size, message in (
        (header.value_bytes - 1, "expected a frame of"),
        (2**32 - 1, "4294967295 bytes of 3000 values: expected at most"),
    ):
        wrong = bytearray(raw)
        wrong[32:36] = size.to_bytes(4, "little")
        seal(wrong)
        with pytest.raises(FrameError, match=message):
            decode_frame(wrong, numel=21_000)
    with pytest.raises(FrameError, match="expected a header of 36"):
        peek_header(raw[:35])
    nothing = encode_non_finite_frame(9, value_format)
    assert nothing.numel() == HEADER_BYTES + 4
    assert not decode_frame(nothing, numel=9).finite
    empty = encode_frame(9, torch.arange(0), quantize(torch.zeros(0), value_format))
    assert decode_frame(empty, numel=9).values.numel() == 0


@pytest.mark.parametrize("value_format", CODED)
def test_every_shorter_payload_is_refused(value_format: str) -> None:
    quantized = quantize(selected("normal")[:40], value_format)
    for size in range(quantized.payload.size):
        with pytest.raises(ValueError, match=r"bytes|not zero"):
            decode_values(quantized.payload[:size], 40, value_format, quantized.exponent)
    with pytest.raises(ValueError, match="bytes"):
        decode_halves(np.zeros(3, np.uint8), 40, rotated=False)


def test_a_block_of_one_outlier_keeps_it() -> None:
    values = np.full(9000, 1e-3, np.float32)
    values[::2] *= -1.1
    values[77] = 5e4
    payload, decoded = encode_levels(values, 1.3, np.array([9000]))
    assert decoded[77] == pytest.approx(5e4, rel=1e-2)
    # in a block of their own
    np.testing.assert_allclose(decoded[4096:], values[4096:], rtol=5e-3)
    again = decode_levels(payload, 9000, np.array([9000]))
    assert again.tobytes() == decoded.tobytes()

"""The mean of whole gradients: bit for bit what adding them one by one gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from topq_dist.compress.codec.frame import Frame, decode_frame, encode_frame
from topq_dist.compress.codec.values import quantize
from topq_dist.compress.kernels.scratch import BLOCK_NUMEL
from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.training.round_mean import GradientSum

NUMEL = 2 * BLOCK_NUMEL + 77


def frame_of(values: Tensor, indices: Tensor | None = None) -> Frame:
    indices = torch.arange(values.numel()) if indices is None else indices
    numel = NUMEL if values.dtype == torch.float32 else values.numel()
    value_format = "fp64" if values.dtype == torch.float64 else "fp32"
    frame = encode_frame(numel, indices, quantize(values, value_format))
    return decode_frame(frame, numel=numel)


def draws(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(NUMEL, generator=generator) for _ in range(count)]
    for values in drawn:
        values[::5] = -0.0
    return drawn


def bits(values: Tensor) -> list[int]:
    return [int(word) for word in values.numpy().view(np.int32)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_gradients_are_added_in_their_order(dtype: torch.dtype) -> None:
    gradient = GradientSum(ModelSpec.of([("w", torch.zeros(NUMEL, dtype=dtype))]))
    drawn = draws(3)
    for _ in range(2):
        gradient.add([[frame_of(values)] for values in drawn])
        expected = np.zeros(NUMEL, dtype=np.float32)
        for values in drawn:
            expected += values.numpy() / np.float32(3)
        summed = torch.from_numpy(expected).to(dtype).float()
        assert bits(gradient.model.flats[0].float()) == bits(summed)
        assert gradient.touched() is None
        gradient.clear()
        assert not gradient.model.flats[0].any()


def test_whole_and_partial_gradients_mix() -> None:
    gradient = GradientSum(ModelSpec.of([("w", torch.zeros(NUMEL))]))
    whole, part = draws(2)
    indices = torch.arange(0, NUMEL, 10)
    gradient.add([[frame_of(whole)], [frame_of(part[::10].contiguous(), indices)]])
    expected = whole.numpy() / np.float32(2) + np.float32(0)
    expected[::10] += part[::10].numpy() / np.float32(2)
    assert bits(gradient.model.flats[0]) == bits(torch.from_numpy(expected))


def test_values_wider_than_the_model_are_rounded_before_they_are_added() -> None:
    gradient = GradientSum(ModelSpec.of([("w", torch.zeros(4))]))
    terms = [torch.full((4,), value, dtype=torch.float64) for value in (1.0, 2.0**-24, 2.0**-24)]
    gradient.add([[frame_of(3 * term)] for term in terms])
    # added in fp64 the two halves of a unit in the last place would make a whole one
    assert gradient.model.flats[0].tolist() == [1.0] * 4

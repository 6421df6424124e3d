"""Selection by torch operations: on the CPU always, on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from topq_dist.compress.sparsify.topk_torch import DeviceSelector

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def drawn(generator: torch.Generator, numel: int, dtype: torch.dtype, kind: int) -> Tensor:
    vector = torch.randn(numel, generator=generator, dtype=torch.float64)
    if kind == 1:
        vector = vector.sign()
    if kind == 2:
        vector *= torch.rand(numel, generator=generator) < 0.003
    if kind == 3:
        vector *= 1e-40
    return vector.to(dtype)


def check(vector: Tensor, k: int, picked: tuple[Tensor, Tensor, bool]) -> None:
    indices, values, finite = picked
    assert indices.numel() == k
    assert bool((indices[1:] > indices[:-1]).all())
    assert torch.equal(values, vector[indices])
    wanted = vector.abs().float().topk(k).values if k else vector[:0].float()
    assert torch.equal(values.abs().float().sort(descending=True).values, wanted)
    assert finite == bool(torch.isfinite(vector).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_exactly_the_largest_through_changes_of_scale_and_kind(
    device: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    for numel, k in ((0, 0), (1, 1), (5, 0), (5, 5), (50_000, 500), (50_001, 20)):
        selector = DeviceSelector()
        residual_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        for step in range(24):
            scale = (1.0, 1.0, 1e-3, 30.0)[step % 4]
            gradient = drawn(generator, numel, dtype, step // 4 % 4).to(device) * scale
            residual = None
            if step % 2:
                residual = torch.randn(numel, generator=generator).to(device, residual_dtype)
            vector = gradient if residual is None else residual + gradient
            check(vector, k, selector.select(gradient, k, residual))


@pytest.mark.parametrize("device", DEVICES)
def test_steady_gradients_are_searched_from_the_last_threshold(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(2)
    selector = DeviceSelector()
    ranked: list[int] = []
    topk = Tensor.topk

    def counted(keys: Tensor, *args: Any, **kwargs: Any) -> Any:
        ranked.append(keys.numel())
        return topk(keys, *args, **kwargs)

    monkeypatch.setattr(Tensor, "topk", counted)
    for _ in range(4):
        selector.select(torch.randn(200_000, generator=generator).to(device), 2000, None)
    assert ranked[0] == 200_000
    assert max(ranked[1:]) < 5000


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_number_is_noticed_and_forgotten(device: str, bad: float) -> None:
    selector = DeviceSelector()
    vector = torch.randn(10_000, generator=torch.Generator().manual_seed(3)).to(device)
    assert selector.select(vector, 100, None)[2]
    spoilt = vector.clone()
    spoilt[77] = bad
    assert not selector.select(spoilt, 100, None)[2]
    check(vector, 100, selector.select(vector, 100, None))

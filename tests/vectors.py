"""Vectors that several tests draw."""

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def drawn(seed: int, numel: int, dtype: torch.dtype, *, scale: float = 1.0) -> Tensor:
    """Return normal numbers; for an odd seed rounded, with zeros and with ties among them."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(numel, generator=generator, dtype=torch.float64) * scale
    return (vector * 4).round().div(4).to(dtype) if seed % 2 else vector.to(dtype)

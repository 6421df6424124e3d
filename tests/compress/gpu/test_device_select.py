"""Selection by Triton's kernels, interpreted: the same bits as the kernels on the CPU."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import compare

from topq_dist.compress.gpu.memory import Arena
from topq_dist.compress.gpu.select import DeviceSelector
from topq_dist.compress.sparsify.segments import Segment, Segments


def test_random_vectors_give_the_bits_of_the_cpu() -> None:
    finite = compare(24, seed=1, most=6000)
    assert 8 < finite < 24


def test_rows_are_for_another_way() -> None:
    rows = Segments([Segment(start=0, rows=2, row_numel=5, k=1)])
    with pytest.raises(ValueError, match="expected one row each"):
        DeviceSelector(Arena()).select(torch.ones(10), None, rows)

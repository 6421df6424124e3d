"""Every element belongs to one part, at one place of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from topq_dist.compress.partition import BlockCyclicPartition


def split_off(parts: BlockCyclicPartition, indices: torch.Tensor) -> list[tuple[Any, torch.Tensor]]:
    """Return of each part where in `indices` its own are, and their places in it."""
    split = parts.split(indices)
    order = np.arange(indices.numel()) if split.order is None else split.order
    return [(order[mine], split.places[mine]) for mine in split.parts]


@given(numel=st.integers(0, 20_000), count=st.integers(1, 40))
def test_every_element_is_split_off_once_and_comes_back(numel: int, count: int) -> None:
    parts = BlockCyclicPartition(numel=numel, count=count)
    indices = torch.arange(numel)
    seen = torch.zeros(numel, dtype=torch.int64)
    for part, (mine, places) in enumerate(split_off(parts, indices)):
        assert torch.equal(places, torch.arange(parts.numel_of(part)))
        assert torch.equal(parts.to_global(part, places), indices[mine])
        seen[mine] += 1
    assert bool((seen == 1).all())


@given(
    numel=st.integers(1, 300_000),
    count=st.integers(1, 300),
    one_in=st.integers(1, 5_000),
    seed=st.integers(0, 99),
)
def test_sparse_indices_are_split_and_come_back(
    numel: int, count: int, one_in: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(numel, generator=generator)[: numel // one_in + 1]
    indices = chosen.sort().values
    parts = BlockCyclicPartition(numel=numel, count=count)
    seen = torch.zeros(indices.numel(), dtype=torch.int64)
    for part, (mine, places) in enumerate(split_off(parts, indices)):
        assert bool((places.diff() > 0).all())
        assert not places.numel() or 0 <= places[0] <= places[-1] < parts.numel_of(part)
        assert torch.equal(parts.to_global(part, places), indices[mine])
        seen[mine] += 1
    assert bool((seen == 1).all())


@given(row_numel=st.sampled_from([64, 512, 1000, 1024]), hot=st.integers(0, 63))
def test_a_hot_column_is_split_evenly(row_numel: int, hot: int) -> None:
    parts = BlockCyclicPartition(numel=4000 * row_numel, count=8)
    column = torch.arange(hot, parts.numel, row_numel)
    counts = [places.numel() for _, places in split_off(parts, column)]
    assert max(counts) < 1.2 * column.numel() / 8


@given(numel=st.integers(0, 20_000), count=st.integers(1, 9), one_in=st.integers(1, 50))
def test_values_are_sorted_by_part_and_back(numel: int, count: int, one_in: int) -> None:
    indices = torch.arange(0, numel, one_in)
    values = torch.arange(indices.numel(), dtype=torch.float64)
    parts = BlockCyclicPartition(numel=numel, count=count)
    split, by_part = parts.split(indices), parts.split(indices).sort(values)
    for part, mine in enumerate(split.parts):
        assert torch.equal(parts.to_global(part, split.places[mine]), indices[by_part[mine].long()])
    back = split.unsort([by_part[mine].numpy() for mine in split.parts])
    assert np.array_equal(back, values.numpy())

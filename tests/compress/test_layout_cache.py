"""Layouts as keys: what is kept for a bucket goes when its names move to another."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from topq_dist.compress.layout import Layout, LayoutCache, gather_tensors
from topq_dist.compress.native import library


def layout(*names: str) -> Layout:
    return Layout(names=names, shapes=((2,),) * len(names))


def test_a_new_layout_drops_those_that_share_a_name_and_no_other() -> None:
    kept: LayoutCache[list[int]] = LayoutCache(list)
    kept.of(layout("a", "b")).append(1)
    kept.of(layout("c")).append(2)
    assert kept.of(layout("a", "b")) == [1]
    assert kept.of(layout("b", "d")) == []
    assert kept.of(layout("c")) == [2]
    assert kept.of(layout("a", "b")) == []


def test_a_layout_is_the_same_in_another_process_where_strings_hash_otherwise() -> None:
    made = layout("a", "b")
    assert hash(made) == hash(layout("a", "b"))
    assert made.numel == 4
    loaded = pickle.loads(pickle.dumps(made))  # noqa: S301 - its own
    assert vars(loaded) == {"names": ("a", "b"), "shapes": ((2,), (2,))}
    assert loaded == made
    assert {made: 1}[loaded] == 1


def test_tensors_are_gathered_at_once_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    names = layout("a", "b")
    tensors: list[Tensor | None] = [torch.ones(2), torch.full((2,), 2.0)]
    out = torch.zeros(4)
    there = library.LIBRARY is not None
    assert gather_tensors(tensors, names, out) == there
    assert out.tolist() == ([1.0, 1.0, 2.0, 2.0] if there else [0.0] * 4)
    out.zero_()
    gaps, sparse = torch.ones(4)[::2], torch.ones(2).to_sparse()
    conjugate = torch.ones(2, dtype=torch.complex64).conj().imag
    for one in (None, gaps, torch.ones(3), torch.ones(2).double(), sparse, conjugate):
        assert not gather_tensors([torch.ones(2), one], names, out)
    assert not out.any()
    monkeypatch.setattr(library, "LIBRARY", None)
    assert not gather_tensors(tensors, names, out)

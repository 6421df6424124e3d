"""Entries of a bucket go when its names move to another."""

from __future__ import annotations

from topq_dist.compress.layout import Layout, LayoutCache


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

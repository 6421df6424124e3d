"""Residuals follow the names when the layout of buckets changes."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from topq_dist.compress.layout import Layout
from topq_dist.compress.residual import Residuals

A, B, C = ("a", (2, 3)), ("b", (4,)), ("c", ())


def layout(*parts: tuple[str, tuple[int, ...]]) -> Layout:
    return Layout(names=tuple(n for n, _ in parts), shapes=tuple(s for _, s in parts))


def flat(residuals: Residuals, *parts: tuple[str, tuple[int, ...]]) -> Tensor:
    return residuals.flat(layout(*parts), dtype=torch.float32, device=torch.device("cpu"))


def test_a_known_layout_keeps_its_home() -> None:
    residuals = Residuals()
    first = flat(residuals, A, B)
    assert first.tolist() == [0.0] * 10
    first += 1
    assert flat(residuals, A, B).data_ptr() == first.data_ptr()


def test_a_rebuilt_layout_finds_each_value_under_its_name() -> None:
    residuals = Residuals()
    flat(residuals, A, B).copy_(torch.arange(10.0))
    flat(residuals, C).fill_(99)
    assert flat(residuals, B, C).tolist() == [6, 7, 8, 9, 99]
    # a is between two homes now, and must not have been lost with the old one
    assert residuals.state_dict()["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert flat(residuals, A).tolist() == [0, 1, 2, 3, 4, 5]


def test_the_old_vector_is_freed_with_its_layout() -> None:
    residuals = Residuals()
    old = flat(residuals, A, B)
    flat(residuals, B)
    held = [residual.untyped_storage().data_ptr() for residual in residuals._by_name.values()]
    assert old.untyped_storage().data_ptr() not in held


def test_state_is_a_copy_both_ways() -> None:
    residuals, other = Residuals(), Residuals()
    home = flat(residuals, A)
    home.fill_(1)
    state = residuals.state_dict()
    other.load_state_dict(state)
    home.fill_(2)
    state["a"].fill_(3)
    assert flat(other, A).tolist() == [1.0] * 6
    other.load_state_dict({})
    assert flat(other, A).tolist() == [0.0] * 6


def test_another_shape_under_a_known_name_is_refused_and_nothing_moves() -> None:
    residuals = Residuals()
    flat(residuals, A, B).fill_(5)
    with pytest.raises(ValueError, match=r"'b' has shape \(4,\).*\(5,\)"):
        flat(residuals, A, ("b", (5,)))
    assert flat(residuals, A, B).tolist() == [5.0] * 10


def test_names_move_while_a_copy_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    residuals, clone = Residuals(), Tensor.clone
    flat(residuals, A, B).copy_(torch.arange(10.0))

    def cloned(held: Tensor, **how: torch.memory_format) -> Tensor:
        monkeypatch.setattr(Tensor, "clone", clone)
        mover = threading.Thread(target=flat, args=(residuals, B, C), daemon=True)
        mover.start()
        mover.join(20)
        assert not mover.is_alive()
        flat(residuals, B, C).fill_(99)
        return clone(held, **how)

    monkeypatch.setattr(Tensor, "clone", cloned)
    state = residuals.state_dict()
    assert state["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert state["b"].tolist() == [6, 7, 8, 9]

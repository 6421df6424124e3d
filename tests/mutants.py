"""Saved states with something wrong in them: trees of which one node, or a few, are others."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 3, 2**31, 2**63, 2**70, 0.5, -0.5, 1e300, 1e39),
    *(float("nan"), float("inf"), "", "x", "00", "a" * 1000, "\ud800"),
    *([], {}, [[]], [None], {"x": 1}, {"version": 1}),
]
TENSORS: list[Tensor] = [
    torch.zeros(0),
    torch.zeros(3),
    torch.zeros(2, 2, dtype=torch.int64),
    torch.tensor(float("nan")),
    torch.ones((), dtype=torch.bool),
    torch.zeros(5, dtype=torch.uint8),
]


def mutants(tree: Any, count: int, seed: int, *, tensors: bool = True) -> Iterator[Any]:
    """Yield `count` copies of a tree of dicts, lists, tuples, tensors and plain values.

    tensors: put wrong tensors in as well, in place of anything.
    """
    draws = random.Random(seed)
    for _ in range(count):
        mutant = copy.deepcopy(tree)
        for _ in range(draws.choice((1, 1, 1, 2, 4))):
            _mutate(mutant, draws, tensors=tensors)
        yield mutant


def _mutate(tree: Any, draws: random.Random, *, tensors: bool) -> None:
    places = list(_places(tree))
    owner, key = draws.choice(places)
    way = draws.random()
    if way < 0.15:
        del owner[key]
    elif way < 0.25:
        other_owner, other_key = draws.choice(places)
        owner[key] = copy.deepcopy(other_owner[other_key])
    elif way < 0.35 and isinstance(owner, list):
        owner.insert(key, copy.deepcopy(owner[key]))
    elif way < 0.45 and isinstance(owner, dict):
        owner[draws.choice(["x", 7, "", f"{key}.x"])] = owner.pop(key)
    elif way < 0.6 and isinstance(owner[key], int | float) and not isinstance(owner[key], bool):
        owner[key] += draws.choice([-1, 1, 0.5, 2**40])
    elif way < 0.75 and isinstance(owner[key], Tensor) and owner[key].numel():
        owner[key] = draws.choice(
            [owner[key].flatten()[:-1], owner[key].double(), owner[key].new_full((1,), 3)]
        )
    else:
        owner[key] = copy.deepcopy(draws.choice([*VALUES, *(TENSORS if tensors else [])]))


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (owner, key) of each node that can be replaced."""
    if isinstance(tree, dict):
        items: list[tuple[Any, Any]] = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    else:
        return
    for key, value in items:
        yield tree, key
        yield from _places(value)

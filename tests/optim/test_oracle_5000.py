"""5,000 random optimizers, stepped beside rai_toolbox's: parameters and gradients to the bit."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Any

import torch
from rai_oracle import OracleOptimizer, oracle_warnings_ignored, same_bits, untied_gradient
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from topq_dist.optim import TopQGradientOptimizer

CASES = 5_000
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INNER: dict[str, Any] = {
    "SGD": (SGD, {"lr": 0.1}),
    "SGD by default": (None, {"lr": 0.5}),
    "SGD with momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "Adam": (Adam, {"lr": 0.01}),
    "partial of SGD": (functools.partial(SGD, lr=0.2, weight_decay=0.1), {}),
    "partial of AdamW": (functools.partial(AdamW, lr=0.2), {"lr": 0.02}),
    "instance of SGD": (functools.partial(SGD, lr=0.1, momentum=0.5), None),
    "instance of Adam": (functools.partial(Adam, lr=0.01), None),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One optimizer to build twice; `own` holds what each group says for itself."""

    dtype: torch.dtype
    shapes: list[list[tuple[int, ...]]]
    own: list[dict[str, Any]]
    keywords: dict[str, Any]
    defaults: dict[str, Any] | None
    inner: str
    steps: int
    seed: int


def fraction(draw: random.Random) -> float:
    return draw.choice([0.0, 1.0, 0.5, draw.random(), draw.random(), draw.random()])


def options(draw: random.Random, ndim: int) -> dict[str, Any]:
    """Draw a value for every option; param_ndim is valid for `ndim` dimensions and more."""
    return {
        "q": fraction(draw),
        "dq": draw.choice([0.0, 0.0, 0.3 * draw.random(), fraction(draw)]),
        "param_ndim": draw.choice([None, *range(-ndim, ndim + 1)]),
        "grad_scale": draw.choice([1.0, 1, 2, draw.uniform(-3, 3)]),
        "grad_bias": draw.choice([0.0, 0, -1, draw.uniform(-1, 1)]),
    }


def some_of(draw: random.Random, values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if draw.random() < 0.4}


def draw_case(seed: int) -> Case:
    draw = random.Random(seed)
    shapes = [
        [
            tuple(draw.randint(1, 4) for _ in range(draw.randint(0, 4)))
            for _ in range(draw.randint(1, 2))
        ]
        for _ in range(draw.randint(1, 3))
    ]
    ndims = [min(map(len, group)) for group in shapes]
    keywords = options(draw, min(ndims))
    return Case(
        dtype=draw.choice(DTYPES),
        shapes=shapes,
        own=[some_of(draw, options(draw, ndim)) for ndim in ndims],
        keywords=keywords,
        defaults=draw.choice([None, some_of(draw, options(draw, min(ndims)))]),
        inner=draw.choice(list(INNER)),
        steps=draw.randint(1, 3),
        seed=seed,
    )


def build(case: Case, kind: Any) -> tuple[Optimizer, list[Tensor], torch.Generator]:
    generator = torch.Generator().manual_seed(case.seed)
    start = torch.Generator().manual_seed(case.seed + 1)
    groups = [
        {
            "params": [
                torch.randn(shape, generator=start).to(case.dtype).requires_grad_()
                for shape in shapes
            ],
            **own,
        }
        for shapes, own in zip(case.shapes, case.own, strict=True)
    ]
    params = [param for group in groups for param in group["params"]]
    inner, inner_keywords = INNER[case.inner]
    shared = dict(case.keywords, generator=generator)
    if case.defaults is not None:
        shared["defaults"] = dict(case.defaults)
    if inner_keywords is None:
        return kind(None, inner(groups), **shared), params, generator
    if inner is None:
        return kind(groups, **shared, **inner_keywords), params, generator
    return kind(groups, inner, **shared, **inner_keywords), params, generator


def mismatch(case: Case) -> str | None:
    """Run the case on both; return what differs first, or None."""
    ours, our_params, our_generator = build(case, TopQGradientOptimizer)
    theirs, their_params, their_generator = build(case, OracleOptimizer)
    draw = random.Random(case.seed)
    gradients = torch.Generator().manual_seed(case.seed + 2)
    for step in range(case.steps):
        for a, b in zip(our_params, their_params, strict=True):
            gradient = untied_gradient(tuple(a.shape), case.dtype, gradients)
            a.grad, b.grad = gradient.clone(), gradient.clone()
            if draw.random() < 0.1:
                a.grad = b.grad = None
        ours.step()
        theirs.step()
        for number, (a, b) in enumerate(zip(our_params, their_params, strict=True)):
            if not same_bits(a, b):
                return f"parameter {number} after step {step}: {a} and {b}"
            if (a.grad is None) != (b.grad is None):
                return f"gradient {number} after step {step}: one of them is None"
            if a.grad is not None and b.grad is not None and not same_bits(a.grad, b.grad):
                return f"gradient {number} after step {step}: {a.grad} and {b.grad}"
    if not torch.equal(our_generator.get_state(), their_generator.get_state()):
        return "the generators took different numbers of draws"
    return None


def test_5000_random_cases_equal_the_oracle() -> None:
    compared, kinds, mismatches = 0, set(), []
    with oracle_warnings_ignored():
        for seed in range(CASES):
            case = draw_case(seed)
            found = mismatch(case)
            if found:
                mismatches.append((case, found))
            compared += 1
            kinds.add((case.dtype, case.inner))
    assert compared == 5_000
    assert len(kinds) == len(DTYPES) * len(INNER)
    assert not mismatches, f"{len(mismatches)} mismatches, the first: {mismatches[0]}"

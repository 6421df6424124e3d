"""rai_toolbox's own optimizers on its base classes and, unchanged, on ours: equal to the bit."""

from __future__ import annotations

import copy
import functools
import pickle
import random
from typing import Any

import pytest
import rai_toolbox.optim
import torch
from rai_oracle import oracle_warnings_ignored, rai_class_on_our_base, same_bits
from torch import Tensor
from torch.optim import LBFGS, SGD, Adam, AdamW

from topq_dist.optim import ChainedParamTransformingOptimizer, ParamTransformingOptimizer

CASES = 40
# the options that each needs, and what a group may have instead
NORMED: dict[str, Any] = {"div_by_zero_eps": 1e-3}
EPSILON = {"epsilon": 0.7}
CLAMPED = {"clamp_min": -0.5, "clamp_max": 0.8}
TOP_Q = {"q": 0.4, "dq": 0.2}
WITH_INNER: dict[str, dict[str, Any]] = {
    "ParamTransformingOptimizer": {},
    "SignedGradientOptim": {},
    "L1NormedGradientOptim": NORMED,
    "L2NormedGradientOptim": {},
    "L2ProjectedOptim": EPSILON,
    "LinfProjectedOptim": EPSILON,
    "ClampedGradientOptimizer": CLAMPED,
    "ClampedParameterOptimizer": CLAMPED,
    "TopQGradientOptimizer": TOP_Q,
    "L1qNormedGradientOptim": {**TOP_Q, **NORMED},
}
FRANK_WOLFE: dict[str, dict[str, Any]] = {
    "L1FrankWolfe": EPSILON,
    "L2FrankWolfe": {**EPSILON, **NORMED},
    "LinfFrankWolfe": {**EPSILON, "use_default_lr_schedule": False, "lr": 0.3},
    "L1qFrankWolfe": {**EPSILON, **TOP_Q},
}
INNER: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD by default": (None, {"lr": 0.5}),
    "SGD with momentum": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "Adam": (Adam, {"lr": 0.01}),
    "partial of AdamW": (functools.partial(AdamW, lr=0.2), {"lr": 0.02}),
    "instance of SGD": (functools.partial(SGD, lr=0.1, momentum=0.5), {}),
    "instance of Adam": (functools.partial(Adam, lr=0.01), {}),
}


def oracle(name: str) -> Any:
    return getattr(rai_toolbox.optim, name)


def ours(name: str) -> Any:
    base = {"ParamTransformingOptimizer": ParamTransformingOptimizer}
    return base.get(name) or rai_class_on_our_base(name)


def some_of(draw: random.Random, values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if draw.random() < 0.4}


def own_options(draw: random.Random, name: str, ndim: int) -> dict[str, Any]:
    """Draw what a group says for itself; param_ndim is valid for `ndim` dimensions and more."""
    options: dict[str, Any] = {
        "param_ndim": draw.choice([None, *range(-ndim, ndim + 1)]),
        "grad_scale": draw.choice([1, 2, draw.uniform(-3, 3)]),
        "grad_bias": draw.choice([0, -1, draw.uniform(-1, 1)]),
        "lr": draw.random(),
    }
    needed = WITH_INNER.get(name, FRANK_WOLFE.get(name, {}))
    for option in {"epsilon", "q", "dq", "clamp_max"}.intersection(needed):
        options[option] = draw.random()
    if name == "L1FrankWolfe":
        options["param_ndim"] = 1  # it knows no other
    return some_of(draw, options)


def build(name: str, kind: Any, seed: int) -> tuple[Any, list[Tensor]]:
    draw = random.Random(f"{name} {seed}")
    start = torch.Generator().manual_seed(seed)
    groups: list[dict[str, Any]] = []
    for _ in range(draw.randint(1, 3)):
        shapes = [
            tuple(draw.randint(1, 4) for _ in range(draw.randint(1, 4)))
            for _ in range(draw.randint(1, 2))
        ]
        params = [torch.randn(shape, generator=start).requires_grad_() for shape in shapes]
        groups.append({"params": params, **own_options(draw, name, min(map(len, shapes)))})
    params = [param for group in groups for param in group["params"]]
    options: dict[str, Any] = dict(WITH_INNER.get(name, FRANK_WOLFE.get(name, {})))
    if "q" in options:
        options["generator"] = torch.Generator().manual_seed(seed)
    options["param_ndim"] = 1 if name == "L1FrankWolfe" else draw.choice([None, -1, 0, 1])
    if name in FRANK_WOLFE:
        return kind(groups, **options), params
    options |= some_of(draw, {"grad_scale": 1.5, "grad_bias": -0.25})
    if draw.random() < 0.3:
        options["defaults"] = {"grad_scale": 0.5}
    label = draw.choice(list(INNER))
    inner, inner_options = INNER[label]
    if label.startswith("instance"):
        return kind(None, inner(groups), **options), params
    return kind(
        groups, **({"InnerOpt": inner} if inner else {}), **options, **inner_options
    ), params


def step_alike(
    a: Any, b: Any, a_params: list[Tensor], b_params: list[Tensor], seed: int, steps: int = 3
) -> None:
    """Step both on equal gradients, some of them None, and compare after each."""
    draw, gradients = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for one, other in zip(a_params, b_params, strict=True):
            gradient = torch.randn(one.shape, generator=gradients)
            one.grad, other.grad = gradient.clone(), gradient.clone()
            if draw.random() < 0.1:
                one.grad = other.grad = None
        with oracle_warnings_ignored():
            a.step()
            b.step()
        for one, other in zip(a_params, b_params, strict=True):
            assert same_bits(one, other)
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None and other.grad is not None:
                assert same_bits(one.grad, other.grad)
        a_groups, b_groups = (made.state_dict()["param_groups"] for made in (a, b))
        assert a_groups == b_groups


@pytest.mark.parametrize("name", [*WITH_INNER, *FRANK_WOLFE])
def test_random_cases_equal_the_oracle(name: str) -> None:
    for seed in range(CASES):
        a, a_params = build(name, ours(name), seed)
        b, b_params = build(name, oracle(name), seed)
        assert isinstance(a, ParamTransformingOptimizer)
        assert not isinstance(b, ParamTransformingOptimizer)
        step_alike(a, b, a_params, b_params, seed)
        assert repr(a) == repr(b)


@pytest.mark.parametrize("name", [*WITH_INNER, *FRANK_WOLFE])
def test_states_are_each_others(name: str) -> None:
    a, a_params = build(name, ours(name), 5)
    b, b_params = build(name, oracle(name), 5)
    step_alike(a, b, a_params, b_params, 1)
    for source, target, params in ((a, b, b_params), (b, a, a_params)):
        saved = copy.deepcopy(source.state_dict())
        for group in target.param_groups:
            group["grad_scale"] = 9.0
        target.load_state_dict(saved)
        assert target.state_dict()["param_groups"] == saved["param_groups"]
        assert target.param_groups[0]["params"][0] is params[0]
        step_alike(a, b, a_params, b_params, 2)


@pytest.mark.parametrize("name", [*WITH_INNER, *FRANK_WOLFE])
@pytest.mark.parametrize("by_pickle", [True, False])
def test_a_copy_goes_on_alike(name: str, *, by_pickle: bool) -> None:
    a, params = build(name, ours(name), 7)
    step_alike(a, a, params, params, 1, steps=1)
    twin = pickle.loads(pickle.dumps(a)) if by_pickle else copy.deepcopy(a)  # noqa: S301
    assert type(twin) is type(a)
    assert twin.param_groups is twin.inner_opt.param_groups
    twins = [param for group in twin.param_groups for param in group["params"]]
    originals = [param for group in a.param_groups for param in group["params"]]
    if "q" in WITH_INNER.get(name, FRANK_WOLFE.get(name, {})):
        for made in (a, twin):
            for group in made.param_groups:
                group["dq"] = 0.0  # the draws of an earlier copy are its own
    step_alike(a, twin, originals, twins, 3)


def chain(kinds: Any, chained: Any, params: Any, **options: Any) -> Any:
    return chained(
        functools.partial(kinds("TopQGradientOptimizer"), q=0.3),
        functools.partial(kinds("ClampedGradientOptimizer"), clamp_max=0.9),
        kinds("L2ProjectedOptim"),
        functools.partial(kinds("L2NormedGradientOptim"), grad_scale=7.0),
        functools.partial(kinds("ClampedParameterOptimizer"), clamp_max=0.1, clamp_min=-0.4),
        params=params,
        defaults={"epsilon": 0.9},
        **options,
    )


@pytest.mark.parametrize("param_ndim", [None, 0, 1, -1])
@pytest.mark.parametrize("inner", [SGD, functools.partial(Adam, amsgrad=True)])
def test_a_chain_of_their_optimizers(param_ndim: int | None, inner: Any) -> None:
    both = []
    for kinds, chained in (
        (ours, ChainedParamTransformingOptimizer),
        (oracle, rai_toolbox.optim.ChainedParamTransformingOptimizer),
    ):
        start = torch.Generator().manual_seed(1)
        params = [torch.randn(3, 4, generator=start).requires_grad_() for _ in range(3)]
        made = chain(
            kinds, chained, params[:1], InnerOpt=inner, lr=0.1, param_ndim=param_ndim, grad_scale=2
        )
        made.add_param_group({"params": params[1], "q": 0.6, "grad_bias": 0.5, "param_ndim": 1})
        made.add_param_group({"params": params[2], "epsilon": 0.1, "clamp_max": 0.2})
        both.append((made, params))
    (a, a_params), (b, b_params) = both
    step_alike(a, b, a_params, b_params, 4)
    assert repr(a) == repr(b)
    assert repr(a).startswith("ClampedParameterOptimizer ○ L2NormedGradientOptim ○ L2Projected")


def test_several_around_one_inner_instance() -> None:
    both = []
    for kinds in (ours, oracle):
        param = torch.linspace(-1, 1, 12).view(3, 4).requires_grad_()
        inner = Adam([{"params": [param], "epsilon": 0.5}], lr=0.1)
        made = [
            kinds("ClampedGradientOptimizer")(None, inner, clamp_max=0.3, grad_scale=2.0),
            kinds("L2ProjectedOptim")(None, inner, epsilon=9.0, param_ndim=1, grad_scale=4.0),
            kinds("SignedGradientOptim")(None, inner, defaults={"grad_bias": 3.0}),
        ]
        assert all(one.param_groups is inner.param_groups for one in made)
        assert all(one.defaults is inner.defaults for one in made)
        added = torch.ones(2, 2, requires_grad=True)
        made[1].add_param_group({"params": [added], "grad_scale": 0.5})
        both.append((made, [param, added]))
    (a, a_params), (b, b_params) = both
    for number in (0, 1, 2, 0):
        step_alike(a[number], b[number], a_params, b_params, number, steps=1)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_one_around_another_scales_as_often(scale: float) -> None:
    both = []
    for kinds in (ours, oracle):
        param = torch.linspace(-1, 1, 6).view(2, 3).requires_grad_()
        inner = kinds("TopQGradientOptimizer")([param], q=0.5, lr=0.1, grad_scale=scale)
        both.append((kinds("ParamTransformingOptimizer")(None, inner, grad_bias=0.25), [param]))
    (a, a_params), (b, b_params) = both
    step_alike(a, b, a_params, b_params, 6)


def test_lbfgs_transforms_after_each_evaluation() -> None:
    results = []
    for kinds in (ours, oracle):
        param = torch.linspace(-1, 2, 6).view(2, 3).requires_grad_()
        optimizer = kinds("L1qNormedGradientOptim")(
            [param], LBFGS, q=0.3, param_ndim=None, lr=0.5, max_iter=4, grad_scale=0.5
        )

        def closure(optimizer: Any = optimizer, param: Tensor = param) -> Tensor:
            optimizer.zero_grad()
            loss = ((param - 1.5) ** 4).sum()
            torch.autograd.backward(loss)
            return loss

        with oracle_warnings_ignored():
            losses = [float(optimizer.step(closure).detach()) for _ in range(2)]
        results.append((losses, param.detach()))
    (our_losses, our_param), (their_losses, their_param) = results
    assert our_losses == their_losses
    assert same_bits(our_param, their_param)

"""Subclasses written for rai_toolbox's bases: what they may count on, and older state of ours."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from rai_oracle import same_bits
from torch import Tensor
from torch.optim import SGD, Adam
from torch.optim.optimizer import required

from topq_dist.optim import (
    ChainedParamTransformingOptimizer,
    GradientTransformerOptimizer,
    ParamTransformingOptimizer,
    TopQGradientOptimizer,
)

_REQUIRED: Any = required


class Halved(ParamTransformingOptimizer):
    """Names no argument but the first, as the examples of rai_toolbox do."""

    def _pre_step_transform_(self, param: Tensor, **_unused: Any) -> None:  # type: ignore[override]
        assert param.grad is not None
        param.grad /= 2

    _post_step_transform_ = _pre_step_transform_  # type: ignore[assignment]


class Within(ParamTransformingOptimizer):
    """Has a required option, and completes groups of a time before it had the other."""

    def __init__(
        self, params: Any, InnerOpt: Any = SGD, *, epsilon: float = _REQUIRED, **options: Any
    ) -> None:
        defaults = options.pop("defaults", None) or {}
        defaults.setdefault("epsilon", epsilon)
        defaults.setdefault("floor", 0.0)
        super().__init__(params, InnerOpt, defaults=defaults, **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("floor", -1.0)

    def _post_step_transform_(self, param: Tensor, optim_group: dict[str, Any]) -> None:
        param.clamp_(optim_group["floor"], optim_group["epsilon"])


def ones(*shape: int) -> Tensor:
    param = torch.ones(shape, requires_grad=True)
    param.grad = torch.full(shape, 4.0)
    return param


def test_the_group_comes_by_keyword() -> None:
    param = ones(2, 3)
    Halved([param], lr=0.25, grad_scale=3.0, grad_bias=1.0).step()
    assert param.grad is not None
    assert torch.equal(param.grad, torch.full((2, 3), 3.5))  # halved after the step once more
    assert torch.equal(param.detach(), torch.full((2, 3), 1 - 0.25 * 7))


@pytest.mark.parametrize("kind", [ParamTransformingOptimizer, GradientTransformerOptimizer])
def test_each_base_scales_with_what_its_groups_say(kind: Any) -> None:
    params = [ones(2), ones(2), ones(2)]
    groups = [{"params": params[0], "grad_scale": 3}, {"params": params[1], "grad_bias": -1.0}]
    optimizer = kind(groups, lr=0.0, grad_scale=2.0, defaults={"grad_bias": 0.5})
    optimizer.add_param_group({"params": params[2]})
    optimizer.step()
    assert [param.grad.tolist() for param in params] == [[12.5] * 2, [7.0] * 2, [8.5] * 2]  # type: ignore[union-attr]


def test_a_scale_that_a_transform_sets_holds_for_its_gradient() -> None:
    class Adaptive(ParamTransformingOptimizer):
        def _pre_step_transform_(self, param: Tensor, optim_group: dict[str, Any]) -> None:
            optim_group["grad_scale"] = float(len(param))

    params = [ones(2, 1), ones(3, 1)]
    Adaptive(params, lr=0.0).step()
    assert [int(param.grad.max()) for param in params] == [8, 12]  # type: ignore[union-attr]


def test_a_transform_put_on_the_object_is_called() -> None:
    param = ones(2)
    optimizer: Any = ParamTransformingOptimizer([param], lr=0.0)
    optimizer._post_step_transform_ = lambda param, optim_group: param.zero_()
    optimizer.step()
    assert param.tolist() == [0.0, 0.0]


def test_a_required_option_has_to_come_from_somewhere() -> None:
    with pytest.raises(TypeError, match="parameter group 0: epsilon is required"):
        Within([ones(2)], lr=0.1)
    optimizer = Within([{"params": ones(2), "epsilon": 0.5}], lr=0.1)
    optimizer.add_param_group({"params": ones(2), "epsilon": 0.25})
    with pytest.raises(TypeError, match="parameter group 2: epsilon is required"):
        optimizer.add_param_group({"params": ones(2)})
    optimizer.step()
    assert Within([ones(2)], defaults={"epsilon": 3.0}).param_groups[0]["epsilon"] == 3.0


def test_older_groups_are_completed_where_torch_has_it_done() -> None:
    optimizer = Within([ones(2)], lr=1.0, epsilon=2.0)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["floor"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["floor"] == -1.0
    optimizer.step()
    assert optimizer.param_groups[0]["params"][0].tolist() == [-1.0, -1.0]
    within = functools.partial(Within, epsilon=2.0)
    chained = ChainedParamTransformingOptimizer(within, params=[ones(2)], lr=1.0)
    chained.load_state_dict(saved)
    assert chained.param_groups[0]["floor"] == -1.0


def test_what_the_hook_sparsifies_is_known_after_a_load() -> None:
    param = ones(1, 4)
    optimizer = TopQGradientOptimizer([param], q=0.5, generator=torch.Generator())
    optimizer.sparsified_elsewhere([param])
    generator = optimizer.generator
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.generator is generator
    optimizer.step()
    assert param.grad is not None
    assert int(param.grad.count_nonzero()) == 4


@pytest.mark.parametrize("inner", [SGD, Adam])
def test_groups_of_a_time_before_they_had_a_scale_are_read(inner: Any) -> None:
    params = [ones(2, 2), ones(2, 2)]
    old, new = (Halved([param], inner, lr=0.1) for param in params)
    for name in ("grad_scale", "grad_bias"):
        del old.param_groups[0][name]
        del old.defaults[name]
    old.step()
    new.load_state_dict(copy.deepcopy(old.state_dict()))
    for param in params:
        param.data.fill_(1.0)
        param.grad = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    old.step()
    new.step()
    assert same_bits(*params)


class AddOne(ParamTransformingOptimizer):
    def _pre_step_transform_(self, param: Tensor, **_unused: Any) -> None:  # type: ignore[override]
        assert param.grad is not None
        param.grad += 1

    def _post_step_transform_(self, param: Tensor, **_unused: Any) -> None:  # type: ignore[override]
        param += 1


class Double(ParamTransformingOptimizer):
    def _pre_step_transform_(self, param: Tensor, **_unused: Any) -> None:  # type: ignore[override]
        assert param.grad is not None
        param.grad *= 2

    def _post_step_transform_(self, param: Tensor, **_unused: Any) -> None:  # type: ignore[override]
        param *= 2


@pytest.mark.parametrize(
    ("kinds", "gradient", "value"),
    [((), 4.0, 1.0), ((AddOne, Double), 10.0, 4.0), ((Double, AddOne), 9.0, 3.0)],
)
def test_a_chain_runs_from_left_to_right_and_scales_once(
    kinds: tuple[Any, ...], gradient: float, value: float
) -> None:
    param = ones(2)
    optimizer = ChainedParamTransformingOptimizer(*kinds, params=[param], lr=0.0, grad_scale=3.0)
    optimizer.step()
    assert param.grad is not None
    assert param.grad.tolist() == [3 * gradient] * 2
    assert param.tolist() == [value] * 2


def test_a_chain_is_named_after_its_links() -> None:
    params = [ones(2)]
    chained = ChainedParamTransformingOptimizer(AddOne, Double, params=params, InnerOpt=Adam)
    assert repr(chained).startswith("Double ○ AddOne [Adam](\nParameter Group 0")
    empty = ChainedParamTransformingOptimizer(params=params)
    assert repr(empty).startswith("ChainedParamTransformingOptimizer [SGD](")


@pytest.mark.parametrize("link", [None, 1.0, SGD, functools.partial(SGD), lambda params: None])
def test_a_link_of_another_kind(link: Any) -> None:
    with pytest.raises(TypeError, match=r"transforming optimizer .*expected a class of Param"):
        ChainedParamTransformingOptimizer(AddOne, link, params=[ones(2)], lr=0.1)


def test_a_chain_needs_params_or_an_instance() -> None:
    with pytest.raises(TypeError, match="params=None: expected an iterable"):
        ChainedParamTransformingOptimizer(AddOne, lr=1.0)
    inner = SGD([ones(2)], lr=1.0)
    chained = ChainedParamTransformingOptimizer(
        functools.partial(TopQGradientOptimizer, q=0.5), InnerOpt=inner
    )
    assert inner.param_groups[0]["q"] == 0.5
    assert chained.inner_opt is inner


def test_the_options_of_every_link_are_checked() -> None:
    param = ones(2, 2)
    top_q = functools.partial(TopQGradientOptimizer, q=0.5)
    chained = ChainedParamTransformingOptimizer(Double, top_q, params=[param], lr=1.0)
    with pytest.raises(ValueError, match=r"parameter group 1: q=7: expected"):
        chained.add_param_group({"params": ones(2, 2), "q": 7})
    bad = chained.state_dict()
    bad["param_groups"][0]["dq"] = -1
    with pytest.raises(ValueError, match=r"parameter group 0: dq=-1: expected"):
        chained.load_state_dict(bad)
    chained.param_groups[0]["q"] = "0.5"
    with pytest.raises(TypeError, match=r"parameter group 0: q='0.5': expected"):
        chained.step()
    assert torch.equal(param.detach(), torch.ones(2, 2))
    with pytest.raises(TypeError, match="parameter group 0: q is required"):
        ChainedParamTransformingOptimizer(TopQGradientOptimizer, params=[param], lr=1.0)

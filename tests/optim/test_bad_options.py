"""Bad options: one error that names what was given, before anything is touched."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam

from topq_dist.optim import GradientTransformerOptimizer, TopQGradientOptimizer

WRONG_TYPE: list[tuple[str, Any]] = [
    ("q", None),
    ("q", "0.9"),
    ("q", True),
    ("q", torch.tensor(0.5)),
    ("dq", None),
    ("dq", [0.1]),
    ("param_ndim", 1.0),
    ("param_ndim", "1"),
    ("grad_scale", None),
    ("grad_scale", "2"),
    ("grad_bias", 1j),
]
WRONG_VALUE: list[tuple[str, Any]] = [
    ("q", 7),
    ("q", -0.01),
    ("q", math.nan),
    ("dq", 1.5),
    ("dq", -1),
    ("param_ndim", 3),
    ("param_ndim", -3),
    ("grad_scale", math.inf),
    ("grad_bias", math.nan),
]
WRONG = [(TypeError, *case) for case in WRONG_TYPE] + [(ValueError, *case) for case in WRONG_VALUE]

bad_options = pytest.mark.parametrize(
    ("error", "name", "value"), WRONG, ids=[f"{name}={value!r}" for _, name, value in WRONG]
)


def make_param() -> Tensor:
    return torch.ones(2, 2, requires_grad=True)


def expected(name: str) -> str:
    return rf"parameter group \d: {name}=.*expected"


@bad_options
def test_in_the_constructor(error: type[Exception], name: str, value: Any) -> None:
    good = {"q": 0.5}
    with pytest.raises(error, match=expected(name)):
        TopQGradientOptimizer([make_param()], **{**good, name: value})
    with pytest.raises(error, match=expected(name)):
        TopQGradientOptimizer([make_param()], defaults={**good, name: value})
    group: dict[str, Any] = {"params": [make_param()], name: value}
    before = dict(group)
    with pytest.raises(error, match=expected(name)):
        TopQGradientOptimizer([{"params": [make_param()]}, group], q=0.5)
    assert group == before


@bad_options
def test_around_an_instance(error: type[Exception], name: str, value: Any) -> None:
    inner = SGD([{"params": [make_param()]}, {"params": [make_param()], name: value}], lr=0.1)
    before = copy.deepcopy((inner.defaults, [set(group) for group in inner.param_groups]))
    with pytest.raises(error, match=expected(name)):
        TopQGradientOptimizer(None, inner, q=0.5)
    assert (inner.defaults, [set(group) for group in inner.param_groups]) == before


@bad_options
def test_in_add_param_group(error: type[Exception], name: str, value: Any) -> None:
    optimizer = TopQGradientOptimizer([make_param()], q=0.5)
    group = {"params": [make_param()], name: value}
    with pytest.raises(error, match=expected(name)):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    assert set(group) == {"params", name}


@bad_options
def test_in_load_state_dict(error: type[Exception], name: str, value: Any) -> None:
    params = [make_param(), make_param()]
    optimizer = TopQGradientOptimizer(
        [{"params": [param]} for param in params], q=0.5, momentum=0.9, lr=0.1
    )
    for param in params:
        param.grad = torch.ones(2, 2)
    optimizer.step()
    state, groups = optimizer.state, optimizer.param_groups
    before = copy.deepcopy(optimizer.state_dict())
    bad = copy.deepcopy(before)
    bad["param_groups"][1][name] = value
    bad["state"][0]["momentum_buffer"].zero_()
    with pytest.raises(error, match=expected(name)):
        optimizer.load_state_dict(bad)
    assert optimizer.state is state
    assert optimizer.param_groups is groups
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, buffers in before["state"].items():
        assert torch.equal(after["state"][index]["momentum_buffer"], buffers["momentum_buffer"])


@bad_options
@pytest.mark.parametrize("closure", [False, True])
def test_live_in_the_group(error: type[Exception], name: str, value: Any, *, closure: bool) -> None:
    params = [make_param(), make_param()]
    optimizer = TopQGradientOptimizer([{"params": [param]} for param in params], q=0.5, lr=1.0)
    optimizer.param_groups[1][name] = value
    for param in params:
        param.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])

    def never() -> float:
        raise AssertionError("the closure ran")

    with pytest.raises(error, match=expected(name).replace(r"\d", "1")):
        optimizer.step(never) if closure else optimizer.step()
    for param in params:
        assert param.grad is not None
        assert param.grad.tolist() == [[1.0, 2.0], [3.0, 4.0]]
        assert torch.equal(param.detach(), torch.ones(2, 2))


def test_a_missing_q() -> None:
    with pytest.raises(TypeError, match="parameter group 0: q is required"):
        TopQGradientOptimizer([make_param()])
    groups: list[dict[str, Any]] = [{"params": make_param(), "q": 0.5}, {"params": make_param()}]
    with pytest.raises(TypeError, match="parameter group 1: q is required"):
        TopQGradientOptimizer(groups)


def test_q_from_defaults_or_from_every_group_is_enough() -> None:
    by_default = TopQGradientOptimizer([make_param()], defaults={"q": 0.25})
    assert by_default.param_groups[0]["q"] == 0.25
    by_group = TopQGradientOptimizer([{"params": [make_param()], "q": 0.75}])
    assert by_group.param_groups[0]["q"] == 0.75
    with pytest.raises(TypeError, match="parameter group 1: q is required"):
        by_group.add_param_group({"params": [make_param()]})
    by_group.add_param_group({"params": make_param(), "q": 0.5})
    assert [group["q"] for group in by_group.param_groups] == [0.75, 0.5]


def test_a_groups_own_value_beats_defaults_which_beat_keywords() -> None:
    groups: list[dict[str, Any]] = [
        {"params": [make_param()]},
        {"params": [make_param()], "q": 0.3, "lr": 3.0},
    ]
    defaults = {"q": 0.2, "lr": 2.0}
    optimizer = TopQGradientOptimizer(groups, q=0.1, lr=1.0, dq=0.01, defaults=defaults)
    assert [group["q"] for group in optimizer.param_groups] == [0.2, 0.3]
    assert [group["lr"] for group in optimizer.param_groups] == [2.0, 3.0]
    assert [group["dq"] for group in optimizer.param_groups] == [0.01, 0.01]
    assert defaults == {"q": 0.2, "lr": 2.0}
    assert groups[0] == {"params": groups[0]["params"]}, "the caller's dicts are not written to"


def test_a_0d_parameter_needs_param_ndim_none_or_0() -> None:
    with pytest.raises(ValueError, match=r"param_ndim=-1: expected at most 0"):
        TopQGradientOptimizer([torch.tensor(1.0, requires_grad=True)], q=0.5)


@pytest.mark.parametrize("generator", [None, 0, torch.tensor(1)])
def test_a_generator_of_another_type(generator: Any) -> None:
    with pytest.raises(TypeError, match=r"generator=.*expected a torch\.Generator"):
        TopQGradientOptimizer([make_param()], q=0.5, generator=generator)


@pytest.mark.parametrize("inner", [None, "SGD", torch.nn.Linear, torch.optim, lambda params: None])
def test_an_inner_optimizer_of_another_type(inner: Any) -> None:
    with pytest.raises(TypeError, match=r"InnerOpt=.*expected a torch\.optim\.Optimizer class"):
        TopQGradientOptimizer([make_param()], inner, q=0.5)


def test_options_for_an_inner_optimizer_that_is_built_already() -> None:
    inner = SGD([make_param()], lr=0.1)
    with pytest.raises(TypeError, match=r"lr: expected no options for InnerOpt.*SGD"):
        TopQGradientOptimizer(None, inner, q=0.5, lr=1.0)
    assert "q" not in inner.param_groups[0]


@pytest.mark.parametrize(
    ("params", "error", "text"),
    [
        (None, TypeError, "params=None: expected an iterable"),
        (torch.ones(2, 2), TypeError, "params=a tensor: expected an iterable"),
        ([], ValueError, r"params=\[\]: expected at least one"),
        ([{"lr": 0.1}], TypeError, "expected a dict with 'params'"),
        ([{"params": [torch.ones(2, 2)]}, 3], TypeError, "expected a dict with 'params'"),
        ([torch.ones(2, 2), 3], TypeError, "can only optimize Tensors"),
    ],
)
def test_params_of_another_kind(params: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        TopQGradientOptimizer(params, q=0.5)


def test_defaults_of_another_type() -> None:
    for kind in (TopQGradientOptimizer, GradientTransformerOptimizer):
        with pytest.raises(TypeError, match=r"defaults=\[\('q', 0\.5\)\]: expected a dict"):
            kind([make_param()], defaults=[("q", 0.5)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("state_dict", "error", "text"),
    [
        ({}, ValueError, r"keys \[\]: expected 'state'"),
        ({"param_groups": []}, ValueError, "expected 'state'"),
        ({"state": {}, "param_groups": []}, ValueError, r"groups of \[\] parameters"),
        (
            {"state": {}, "param_groups": [{"params": [0, 1], "q": 0.5}]},
            ValueError,
            r"groups of \[2\] parameters: expected groups of \[1\]",
        ),
        ({"state": {}, "param_groups": [{"params": [0], "lr": 1.0}]}, TypeError, "is required"),
    ],
)
def test_a_state_dict_that_does_not_fit(
    state_dict: dict[str, Any], error: type[Exception], text: str
) -> None:
    optimizer = TopQGradientOptimizer([make_param()], q=0.5)
    groups = optimizer.param_groups
    with pytest.raises(error, match=text):
        optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups is groups


def test_a_state_that_the_inner_optimizer_chokes_on_leaves_all_as_it_was() -> None:
    param = make_param()
    with_momentum = TopQGradientOptimizer([param], SGD, q=0.5, lr=0.1, momentum=0.9)
    with_adam = TopQGradientOptimizer([param], Adam, q=0.25, lr=0.2)
    param.grad = torch.ones(2, 2)
    with_momentum.step()
    with_adam.step()
    state, groups = with_adam.state, with_adam.param_groups
    steps = float(state[param]["step"])
    with pytest.raises(KeyError, match="step"):
        with_adam.load_state_dict(with_momentum.state_dict())
    assert with_adam.inner_opt.state is state
    assert with_adam.inner_opt.param_groups is groups
    assert groups[0]["q"] == 0.25
    with_adam.step()
    assert float(with_adam.state[param]["step"]) == steps + 1

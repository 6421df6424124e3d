"""The inner optimizer by name: what is taken, what is refused and in which words."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from topq_dist.ps.protocol.config import GroupRule, TrainingConfig
from topq_dist.ps.training.inner_optimizer import (
    check_inner_optimizer,
    make_inner_optimizer,
    optimizer_class,
)

USABLE = sorted(
    name
    for name, value in vars(torch.optim).items()
    if inspect.isclass(value) and name not in ("Optimizer", "LBFGS", "SparseAdam")
)


def tensors() -> dict[str, Tensor]:
    return {
        "body.weight": torch.zeros(3, 4),
        "body.bias": torch.zeros(3),
        "head.weight": torch.zeros(2, 3),
    }


@pytest.mark.parametrize("name", USABLE)
def test_every_optimizer_of_torch_is_found_in_any_case(name: str) -> None:
    for spelled in (name, name.lower(), name.upper()):
        assert optimizer_class(spelled).__name__ == name
        check_inner_optimizer(TrainingConfig(inner_opt=spelled))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sgdd", "inner_opt='sgdd': expected one of ASGD, Adadelta"),
        ("optimizer", "expected one of"),
        ("lr_scheduler", "expected one of"),
        ("LBFGS", "evaluates the loss again"),
        ("sparseadam", "sparse tensors only"),
    ],
)
def test_other_names_are_refused_with_the_reason(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer_class(name)


@pytest.mark.parametrize(
    ("inner_opt", "options", "message"),
    [
        ("sgd", {"momentun": 0.9}, "no option 'momentun': expected one of lr, momentum"),
        ("sgd", {"params": []}, "params: the model arrives from the workers"),
        ("sgd", {"differentiable": True}, "differentiable: nobody"),
        ("adamw", {"capturable": True}, "capturable: it is for CUDA graphs"),
        ("sgd", {"lr": "abc"}, "lr='abc': expected a finite number"),
        ("sgd", {"lr": True}, "lr=True: expected a finite number"),
        ("sgd", {"lr": float("inf")}, "lr=inf: expected a finite number"),
        ("sgd", {"lr": torch.tensor(0.1)}, "expected a finite number"),
        ("sgd", {"lr": -1.0}, "inner_opt='sgd' with lr=-1.0: Invalid learning rate"),
        ("sgd", {"nesterov": 1}, "nesterov=1: expected True or False"),
        ("sgd", {"nesterov": True}, "Nesterov momentum requires"),
        ("sgd", {"foreach": "yes"}, "foreach='yes': expected True or False"),
        ("sgd", {"foreach": True, "fused": True}, "inner_opt='sgd' with .*fused"),
        ("adamw", {"betas": (0.9,)}, "betas=.*: expected 2 numbers"),
        ("adamw", {"betas": (0.9, "x")}, "expected a finite number"),
        ("adamw", {"betas": 0.9}, r"expected something like \(0.9, 0.999\)"),
        ("adamw", {"betas": (0.9, 1.5)}, "Invalid beta"),
        ("muon", {"adjust_lr_fn": "mine"}, "adjust_lr_fn='mine'"),
    ],
)
def test_wrong_options_are_named(inner_opt: str, options: dict[str, Any], message: str) -> None:
    config = TrainingConfig(inner_opt=inner_opt, options=options)
    with pytest.raises(ValueError, match=message):
        check_inner_optimizer(config)
    with pytest.raises(ValueError, match=message):
        make_inner_optimizer(config, tensors())
    if "foreach" in options or "fused" in options:
        return
    rule = TrainingConfig(inner_opt=inner_opt, groups=(GroupRule(pattern="*", options=options),))
    with pytest.raises(ValueError, match=message):
        check_inner_optimizer(rule)


def test_groups_follow_the_first_rule_that_matches() -> None:
    config = TrainingConfig(
        inner_opt="adamw",
        options={"lr": 0.1, "weight_decay": 0.3, "betas": [0.8, 0.9]},
        groups=(
            GroupRule(pattern="*.bias", options={"weight_decay": 0.0}),
            GroupRule(pattern="body.*", options={"lr": 0.2}),
        ),
    )
    optimizer, names = make_inner_optimizer(config, tensors())
    assert names == [("head.weight",), ("body.bias",), ("body.weight",)]
    seen = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert seen == [(0.1, 0.3), (0.1, 0.0), (0.2, 0.3)]
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)


def test_a_rule_for_all_leaves_no_empty_group() -> None:
    rule = GroupRule(pattern="*", options={"lr": 0.2})
    optimizer, names = make_inner_optimizer(
        TrainingConfig(inner_opt="sgd", groups=(rule,)), tensors()
    )
    assert names == [tuple(tensors())]
    assert len(optimizer.param_groups) == 1


def test_a_rule_that_matches_nothing_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    rule = GroupRule(pattern="tail.*", options={"lr": 0.2})
    with caplog.at_level(logging.WARNING):
        make_inner_optimizer(TrainingConfig(inner_opt="sgd", groups=(rule,)), tensors())
    assert "'tail.*' matches no tensor" in caplog.text


def test_foreach_and_fused_are_for_all_groups_alike() -> None:
    rule = GroupRule(pattern="*", options={"fused": True})
    with pytest.raises(ValueError, match="takes fused for all groups alike"):
        check_inner_optimizer(TrainingConfig(inner_opt="sgd", groups=(rule,)))


def kernels(inner_opt: str, options: dict[str, Any], dtype: torch.dtype) -> tuple[Any, Any]:
    config = TrainingConfig(inner_opt=inner_opt, options=options)
    optimizer, _ = make_inner_optimizer(config, {"a": torch.zeros(2, 2, dtype=dtype)})
    (group,) = optimizer.param_groups
    return group.get("fused"), group.get("foreach")


def test_the_fastest_kernels_are_used_unless_others_are_asked_for() -> None:
    assert kernels("adamw", {}, torch.float32) == (True, None)
    assert kernels("adamw", {}, torch.bfloat16) == (None, True)
    assert kernels("adamax", {}, torch.float32) == (None, True)
    assert kernels("muon", {}, torch.float32) == (None, None)
    assert kernels("adamw", {"foreach": True}, torch.float32)[1] is True
    assert kernels("adamw", {"fused": False}, torch.float32)[0] is False


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_moves_and_the_fused_sgd_that_would_not_is_refused(
    dtype: torch.dtype,
) -> None:
    parameter = torch.zeros(100, dtype=dtype)
    optimizer, _ = make_inner_optimizer(
        TrainingConfig(inner_opt="sgd", options={"lr": 1.0}), {"a": parameter}
    )
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert bool((parameter == -1).all())
    config = TrainingConfig(inner_opt="sgd", options={"fused": True})
    with pytest.raises(ValueError, match="half precision"):
        make_inner_optimizer(config, {"a": parameter})


def test_a_model_that_the_optimizer_cannot_take_is_told() -> None:
    config = TrainingConfig(inner_opt="muon")
    check_inner_optimizer(config)
    with pytest.raises(ValueError, match="inner_opt='muon' with no options: Muon only supports 2D"):
        make_inner_optimizer(config, tensors())

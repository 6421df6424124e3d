"""The two bases as a user subclasses them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW

from topq_dist.optim import GradientTransformerOptimizer, ParamTransformingOptimizer
from topq_dist.validation import check_number


class SignedGradient(GradientTransformerOptimizer):
    def _pre_step_transform_(self, param: Tensor, optim_group: dict[str, Any]) -> None:
        assert param.grad is not None
        param.grad.sign_()


class MaxNormed(ParamTransformingOptimizer):
    """Divides each sub-tensor of the gradient by its largest element."""

    def _pre_step_transform_(self, param: Tensor, optim_group: dict[str, Any]) -> None:
        assert param.grad is not None
        rows = param.grad.flatten(1)
        rows /= rows.amax(dim=1, keepdim=True)


class Clamped(ParamTransformingOptimizer):
    """Clamps parameters to an interval that each group may choose."""

    def __init__(self, params: Any, InnerOpt: Any = SGD, *, limit: float, **options: Any) -> None:
        defaults = {"limit": limit, **options.pop("defaults", {})}
        super().__init__(params, InnerOpt, defaults=defaults, **options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        super().check_group(group)
        if check_number("limit", group["limit"]) <= 0:
            raise ValueError(f"limit={group['limit']}: expected more than 0")

    def _post_step_transform_(self, param: Tensor, optim_group: dict[str, Any]) -> None:
        param.clamp_(-optim_group["limit"], optim_group["limit"])


def test_a_sign_optimizer_around_adamw() -> None:
    x = torch.tensor([-10.0, 10.0], requires_grad=True)
    optimizer = SignedGradient([x], AdamW, lr=0.1, grad_scale=3.0, grad_bias=0.5)
    torch.autograd.backward((torch.tensor([10_000.0, -3.0]) * x).sum())
    optimizer.step()
    assert x.grad is not None
    assert x.grad.tolist() == [3.5, -2.5]
    assert torch.allclose(x.detach(), torch.tensor([-10.0 * 0.999 - 0.1, 10.0 * 0.999 + 0.1]))


@pytest.mark.parametrize(
    ("param_ndim", "expected"),
    [
        (0, [[1.0, 1.0], [1.0, 1.0]]),
        (1, [[0.5, 1.0], [1.0, 0.5]]),
        (2, [[0.05, 0.1], [1.0, 0.5]]),
        (-1, [[0.5, 1.0], [1.0, 0.5]]),
        (None, [[0.05, 0.1], [1.0, 0.5]]),
    ],
)
def test_param_ndim_says_what_a_transform_sees(
    param_ndim: int | None, expected: list[list[float]]
) -> None:
    x = torch.tensor([[1.0, 2.0], [20.0, 10.0]], requires_grad=True)
    optimizer = MaxNormed([x], param_ndim=param_ndim, lr=0.0)
    torch.autograd.backward((x * x).sum())
    optimizer.step()
    assert x.grad is not None
    assert torch.allclose(x.grad, torch.tensor(expected))


@pytest.mark.parametrize("param_ndim", [1, 2, -1, -2, None])
def test_a_transform_may_flatten_what_is_not_contiguous(param_ndim: int | None) -> None:
    numbers = 1.0 + torch.randperm(24, generator=torch.Generator().manual_seed(1)).view(2, 3, 4)
    results = []
    for strided in (numbers, numbers.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        param = torch.zeros(2, 3, 4, requires_grad=True)
        param.grad = strided
        MaxNormed([param], param_ndim=param_ndim, lr=1.0).step()
        assert param.grad is strided
        results.append(strided.contiguous())
    assert torch.equal(*results)


def test_a_clamping_optimizer_with_an_option_of_its_own() -> None:
    x, y = (torch.tensor([-10.0, 1.0], requires_grad=True) for _ in range(2))
    optimizer = Clamped([{"params": x}, {"params": y, "limit": 2.0}], limit=1.0, lr=0.1)
    for param in (x, y):
        param.grad = torch.tensor([-1.0, 1.0])
    optimizer.step()
    assert torch.allclose(x.detach(), torch.tensor([-1.0, 0.9]))
    assert torch.allclose(y.detach(), torch.tensor([-2.0, 0.9]))
    with pytest.raises(ValueError, match=r"parameter group 2: limit=-1: expected more than 0"):
        optimizer.add_param_group({"params": torch.ones(2, requires_grad=True), "limit": -1})


def test_a_parameter_that_is_not_contiguous_is_transformed_in_place() -> None:
    storage = torch.full((3, 4), 5.0)
    param = storage.t().requires_grad_()
    Clamped([param], limit=2.0, lr=0.1, param_ndim=0).step()
    assert torch.equal(storage.detach(), torch.full((3, 4), 2.0))


def test_without_a_gradient_only_the_post_step_transform_runs() -> None:
    class Recording(ParamTransformingOptimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1)
            self.seen: list[tuple[str, tuple[int, ...], bool]] = []

        def _pre_step_transform_(self, param: Tensor, optim_group: dict[str, Any]) -> None:
            self.seen.append(("pre", tuple(param.shape), param.grad is not None))

        def _post_step_transform_(self, param: Tensor, optim_group: dict[str, Any]) -> None:
            self.seen.append(("post", tuple(param.shape), param.grad is not None))

    with_gradient, without = (torch.ones(3, 2, 2, requires_grad=True) for _ in range(2))
    optimizer = Recording([with_gradient, without])
    with_gradient.grad = torch.ones(3, 2, 2)
    optimizer.step()
    assert optimizer.seen == [
        ("pre", (3, 2, 2), True),
        ("post", (3, 2, 2), True),
        ("post", (3, 2, 2), False),
    ]


def test_a_gradient_that_is_replaced_is_an_error() -> None:
    class Replacing(ParamTransformingOptimizer):
        def _pre_step_transform_(self, param: Tensor, optim_group: dict[str, Any]) -> None:
            assert param.grad is not None
            param.grad = param.grad.sign()

    x = torch.ones(3, requires_grad=True)
    x.grad = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"a transform of Replacing replaced param\.grad"):
        Replacing([x], lr=1.0).step()
    assert x.tolist() == [1.0, 1.0, 1.0]


def test_transforms_nest() -> None:
    x = torch.tensor([0.5, -3.0], requires_grad=True)
    optimizer = Clamped([x], SignedGradient, limit=1.0, lr=1.0)
    x.grad = torch.tensor([0.1, 0.2])
    optimizer.step()
    assert x.grad.tolist() == [1.0, 1.0]
    assert x.tolist() == [-0.5, -1.0]
    assert optimizer.param_groups is optimizer.inner_opt.param_groups
    assert set(optimizer.param_groups[0]) >= {"limit", "grad_scale", "param_ndim", "lr"}


def test_the_bases_alone_change_nothing() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    for kind in (ParamTransformingOptimizer, GradientTransformerOptimizer):
        x.grad = torch.tensor([0.5, -0.5])
        kind([x], lr=0.0).step()
        assert x.grad.tolist() == [0.5, -0.5]


def test_the_representation_names_both_optimizers() -> None:
    text = repr(SignedGradient([torch.ones(2, requires_grad=True)], AdamW, grad_scale=2.0))
    assert text.startswith("SignedGradient [AdamW](")
    assert "grad_scale: 2.0" in text

"""state_dict, pickle and copy.deepcopy: the copy goes on as the original would."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Adam
from torch.optim.lr_scheduler import StepLR

from topq_dist.optim import ParamTransformingOptimizer, TopQGradientOptimizer

Copier = Callable[[Any], Any]


def by_pickle(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))  # noqa: S301 - our own bytes


def by_torch_save(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # our own bytes


copiers = pytest.mark.parametrize("copier", [copy.deepcopy, by_pickle, by_torch_save])
inners = pytest.mark.parametrize(
    "inner",
    [Adam, functools.partial(SGD, momentum=0.9), functools.partial(Adam, amsgrad=True)],
    ids=["Adam", "SGD with momentum", "amsgrad"],
)


def trained(inner: Any, **options: Any) -> TopQGradientOptimizer:
    params = [torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)]
    options = {"q": 0.5, "lr": 0.1, **options}
    optimizer = TopQGradientOptimizer(params, inner, **options)
    optimizer.add_param_group({"params": [torch.randn(2, 5, requires_grad=True)], "q": 0.25})
    go_on(optimizer, steps=2)
    return optimizer


def go_on(optimizer: TopQGradientOptimizer, steps: int = 3) -> list[Tensor]:
    """Step on gradients that are the same at each call; return the parameters."""
    gradients = torch.Generator().manual_seed(9)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=gradients)
        optimizer.step()
    return params


def assert_goes_on_alike(a: TopQGradientOptimizer, b: TopQGradientOptimizer) -> None:
    for one, other in zip(go_on(a), go_on(b), strict=True):
        assert one is not other
        assert torch.equal(one, other)


def assert_shares_its_inner_state(optimizer: TopQGradientOptimizer) -> None:
    assert optimizer.param_groups is optimizer.inner_opt.param_groups
    assert optimizer.state is optimizer.inner_opt.state
    assert optimizer.defaults is optimizer.inner_opt.defaults


@inners
@copiers
def test_a_copy_goes_on_alike(copier: Copier, inner: Any) -> None:
    original = trained(inner, dq=0.2, generator=torch.Generator().manual_seed(3))
    twin = copier(original)
    assert type(twin) is TopQGradientOptimizer
    assert type(twin.inner_opt) is type(original.inner_opt)
    assert_shares_its_inner_state(original)
    assert_shares_its_inner_state(twin)
    assert_goes_on_alike(original, twin)


@copiers
def test_a_copy_keeps_its_parameters_with_the_model(copier: Copier) -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = TopQGradientOptimizer(model.parameters(), q=0.5, lr=1.0)
    model_copy, optimizer_copy = copier((model, optimizer))
    assert optimizer_copy.param_groups[0]["params"][0] is model_copy.weight
    before = model.weight.detach().clone()
    torch.autograd.backward(model_copy(torch.ones(4)).sum())
    optimizer_copy.step()
    assert torch.equal(model.weight, before)
    assert not torch.equal(model_copy.weight, before)


@copiers
def test_the_default_generator_is_restored_as_such(copier: Copier) -> None:
    assert copier(trained(SGD)).generator is torch.default_generator


@copiers
def test_another_generator_keeps_its_state_and_is_no_longer_shared(copier: Copier) -> None:
    generator = torch.Generator().manual_seed(11)
    torch.rand(5, generator=generator)
    twin = copier(trained(SGD, generator=generator))
    assert twin.generator is not generator
    assert torch.equal(twin.generator.get_state(), generator.get_state())
    torch.rand(1, generator=generator)
    assert not torch.equal(twin.generator.get_state(), generator.get_state())


@copiers
def test_a_copy_is_not_paired_with_the_hook(copier: Copier) -> None:
    original = trained(SGD)
    original.sparsified_elsewhere(original.param_groups[0]["params"])
    twin = copier(original)
    for optimizer, kept in ((original, 12), (twin, 6)):
        param = optimizer.param_groups[0]["params"][0]
        param.grad = torch.arange(1.0, 13.0).view(3, 4)
        optimizer.step()
        assert int(param.grad.count_nonzero()) == kept


@copiers
def test_hooks_and_the_step_of_a_scheduler_stay_behind(copier: Copier) -> None:
    original = trained(SGD)
    called = []
    original.register_step_pre_hook(lambda *_: called.append("hook"))
    StepLR(original, step_size=1)
    twin = copier(original)
    assert "step" in vars(original)
    assert "step" not in vars(twin)
    go_on(twin)
    assert not called
    twin.register_step_post_hook(lambda *_: called.append("own hook"))
    go_on(twin, steps=1)
    assert called == ["own hook"]


@copiers
def test_a_copy_around_lbfgs_steps(copier: Copier) -> None:
    original = TopQGradientOptimizer([torch.ones(2, 3, requires_grad=True)], LBFGS, q=0.5)
    results = []
    for optimizer in (original, copier(original)):
        param = optimizer.param_groups[0]["params"][0]

        def closure(optimizer: Any = optimizer, param: Tensor = param) -> float:
            optimizer.zero_grad()
            loss = (param * param * torch.arange(6.0).view(2, 3)).sum()
            torch.autograd.backward(loss)
            return loss.item()

        for _ in range(2):
            optimizer.step(closure)
        results.append(param)
    assert results[0] is not results[1]
    assert not torch.equal(results[0], torch.ones(2, 3))
    assert torch.equal(*results)


@copiers
def test_a_wrapped_wrapper_is_copied_whole(copier: Copier) -> None:
    param = torch.ones(1, 4, requires_grad=True)
    inner = TopQGradientOptimizer([param], q=0.5, lr=1.0)
    inner.sparsified_elsewhere([param])
    twin = copier(ParamTransformingOptimizer(None, inner))
    assert twin.state is twin.inner_opt.inner_opt.state
    [twin_param] = twin.param_groups[0]["params"]
    twin_param.grad = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    twin.step()
    assert twin_param.grad.tolist() == [[0.0, 0.0, 3.0, 4.0]]


class Clamped(ParamTransformingOptimizer):
    """Has an attribute of its own, as subclasses do."""

    limit = 0.0

    def _post_step_transform_(self, param: Tensor, optim_group: dict[str, Any]) -> None:
        param.clamp_(-self.limit, self.limit)


@copiers
def test_attributes_of_a_subclass_survive(copier: Copier) -> None:
    optimizer = Clamped([torch.ones(3, requires_grad=True)], lr=0.1)
    optimizer.limit = 0.5
    twin = copier(optimizer)
    twin.step()
    assert twin.param_groups[0]["params"][0].tolist() == [0.5] * 3


def test_the_state_dict_is_the_inner_one_and_carries_the_options() -> None:
    optimizer = trained(Adam, grad_scale=2.0)
    saved = optimizer.state_dict()
    assert saved["param_groups"] == optimizer.inner_opt.state_dict()["param_groups"]
    for group, q in zip(saved["param_groups"], (0.5, 0.25), strict=True):
        options = ("q", "dq", "param_ndim", "grad_scale", "grad_bias")
        assert [group[name] for name in options] == [q, 0.0, -1, 2.0, 0.0]


@inners
def test_a_loaded_state_goes_on_alike(inner: Any) -> None:
    original = trained(inner)
    original.param_groups[0]["q"] = 0.75
    fresh = trained(inner, q=0.1, lr=5.0)
    for param, source in zip(go_on(fresh, 0), go_on(original, 0), strict=True):
        param.data.copy_(source)
    fresh.load_state_dict(by_torch_save(original.state_dict()))
    assert [group["q"] for group in fresh.param_groups] == [0.75, 0.25]
    assert_shares_its_inner_state(fresh)
    assert_goes_on_alike(original, fresh)


def test_a_state_loaded_into_the_inner_optimizer_is_seen() -> None:
    optimizer = trained(Adam)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["q"] = 0.125
    optimizer.inner_opt.load_state_dict(saved)
    assert optimizer.param_groups[0]["q"] == 0.125
    assert_shares_its_inner_state(optimizer)


def test_hooks_on_the_state_dict_are_called() -> None:
    optimizer = trained(SGD)
    called = []

    def set_q(q: float) -> Callable[[Any, dict[str, Any]], dict[str, Any]]:
        def hook(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            groups = [{**group, "q": q} for group in state_dict["param_groups"]]
            return {**state_dict, "param_groups": groups}

        return hook

    optimizer.register_state_dict_pre_hook(lambda _: called.append("saving"))
    optimizer.register_state_dict_post_hook(set_q(0.375))
    saved = optimizer.state_dict()
    assert [group["q"] for group in saved["param_groups"]] == [0.375] * 2
    optimizer.register_load_state_dict_pre_hook(set_q(0.625))
    optimizer.register_load_state_dict_post_hook(lambda _: called.append("loaded"))
    optimizer.load_state_dict(saved)
    assert [group["q"] for group in optimizer.param_groups] == [0.625] * 2
    assert called == ["saving", "loaded"]

"""TopQGradientOptimizer and gradients, beyond what rai_toolbox can be asked."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rai_oracle import OracleOptimizer, oracle_warnings_ignored, same_bits, untied_gradient
from torch import Tensor

from topq_dist.optim import TopQGradientOptimizer

shapes = st.lists(st.integers(1, 4), max_size=4).map(tuple)


def stepped(gradient: Tensor, **options: Any) -> Tensor:
    """Return the gradient of a parameter of ones after one step."""
    param = torch.ones_like(gradient).requires_grad_()
    param.grad = gradient
    TopQGradientOptimizer([param], lr=1.0, **options).step()
    assert param.grad is gradient
    return gradient


@given(
    data=st.data(),
    shape=shapes,
    q=st.floats(0.0, 1.0),
    dq=st.just(0.0) | st.floats(0.0, 1.0),
    scale=st.floats(-4.0, 4.0),
    bias=st.floats(-4.0, 4.0),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_the_oracle_agrees(
    data: st.DataObject,
    shape: tuple[int, ...],
    q: float,
    dq: float,
    scale: float,
    bias: float,
    seed: int,
) -> None:
    param_ndim = data.draw(st.none() | st.integers(-len(shape), len(shape)))
    gradient = untied_gradient(shape, torch.float32, torch.Generator().manual_seed(seed))
    results = []
    for kind in (TopQGradientOptimizer, OracleOptimizer):
        param = torch.ones(shape, requires_grad=True)
        param.grad = gradient.clone()
        optimizer = kind(
            [param],
            lr=0.5,
            q=q,
            dq=dq,
            param_ndim=param_ndim,
            grad_scale=scale,
            grad_bias=bias,
            generator=torch.Generator().manual_seed(seed),
        )
        with oracle_warnings_ignored():
            optimizer.step()
        results.append((param, param.grad))
    for ours, theirs in zip(*results, strict=True):
        assert same_bits(ours, theirs)


@given(shape=shapes, q=st.floats(0.0, 1.0), seed=st.integers(0, 2**32), data=st.data())
@settings(max_examples=100, deadline=None)
def test_strides_do_not_matter(
    shape: tuple[int, ...], q: float, seed: int, data: st.DataObject
) -> None:
    param_ndim = data.draw(st.none() | st.integers(-len(shape), len(shape)))
    order = data.draw(st.permutations(range(len(shape))))
    back = [order.index(i) for i in range(len(shape))]
    gradient = untied_gradient(shape, torch.float32, torch.Generator().manual_seed(seed))
    expected = stepped(gradient.clone(), q=q, param_ndim=param_ndim)

    # the same numbers in storage of another order, with gaps between them
    roomy = torch.full([2 * n for n in gradient.permute(order).shape], 7.0)
    strided = roomy[(slice(None, None, 2),) * len(shape)].permute(back)
    strided.copy_(gradient)
    param = torch.ones_like(roomy)[(slice(None, None, 2),) * len(shape)].permute(back)
    param = param.detach().requires_grad_()
    param.grad = strided
    TopQGradientOptimizer([param], lr=1.0, q=q, param_ndim=param_ndim).step()
    assert param.grad is strided
    assert torch.equal(strided, expected)
    assert torch.equal(param.detach(), 1 - expected)
    assert int((roomy == 7.0).sum()) >= roomy.numel() - gradient.numel()


@pytest.mark.parametrize("param_ndim", [None, 0, 1, -1, 2, -2])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_empty_tensors_pass_through(shape: tuple[int, ...], param_ndim: int | None) -> None:
    full = torch.ones(2, 2, requires_grad=True)
    empty = torch.ones(shape, requires_grad=True)
    optimizer = TopQGradientOptimizer([empty, full], lr=1.0, q=0.5, param_ndim=param_ndim)
    torch.autograd.backward((full * torch.tensor([[1.0, 2.0], [4.0, 3.0]])).sum() + empty.sum())
    optimizer.step()
    assert empty.grad is not None
    assert empty.grad.shape == shape


def test_nan_outranks_infinity_and_stays() -> None:
    gradient = torch.tensor([1.0, math.inf, math.nan, -math.inf])
    assert stepped(gradient.clone(), q=0.75, param_ndim=None).isnan().tolist() == [
        False,
        False,
        True,
        False,
    ]
    kept = stepped(gradient.clone(), q=0.25, param_ndim=None)
    assert kept[0] == 0
    assert kept[1:].isfinite().sum() == 0


def test_a_bias_at_minus_one_stays_or_goes_whole() -> None:
    gradient = torch.tensor([1.0, -2.0, 3.0])
    assert torch.equal(stepped(gradient.clone(), q=0.49), gradient)
    assert torch.equal(stepped(gradient.clone(), q=0.5), torch.zeros(3))


def test_bias_reaches_zeroed_elements_and_scale_comes_first() -> None:
    gradient = stepped(torch.tensor([1.0, 4.0]), q=0.5, param_ndim=None, grad_scale=2, grad_bias=3)
    assert gradient.tolist() == [3.0, 11.0]


def test_complex_gradients() -> None:
    gradient = torch.tensor([3 + 4j, 4.5, -1j, 6j])
    assert stepped(gradient, q=0.5, param_ndim=None).tolist() == [3 + 4j, 0, 0, 6j]


def test_groups_have_their_own_values_and_draw_in_order() -> None:
    generator, twin = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    params = [torch.ones(1, 100, requires_grad=True) for _ in range(4)]
    optimizer = TopQGradientOptimizer(
        [{"params": params[:3], "dq": 0.2}, {"params": params[3:], "q": 0.3}],
        q=0.5,
        dq=0.1,
        generator=generator,
    )
    for param in (params[0], params[2], params[3]):
        param.grad = torch.randn(1, 100)
    optimizer.step()
    assert params[1].grad is None
    for param, low, high in ((params[0], 0.3, 0.7), (params[2], 0.3, 0.7), (params[3], 0.2, 0.4)):
        assert param.grad is not None
        q = float((high - low) * torch.rand(1, generator=twin) + low)
        assert int(param.grad.count_nonzero()) == pytest.approx(100 * (1 - q), abs=1)
    assert torch.equal(generator.get_state(), twin.get_state())


def test_q_can_be_scheduled_in_the_group() -> None:
    param = torch.ones(1, 10, requires_grad=True)
    optimizer = TopQGradientOptimizer([param], lr=0.1, q=0.0)
    kept = []
    for q in (0.0, 0.5, 0.9, 1.0):
        optimizer.param_groups[0]["q"] = q
        param.grad = torch.arange(1.0, 11.0)[None]
        optimizer.step()
        kept.append(int(param.grad.count_nonzero()))
    assert kept == [10, 5, 1, 0]


def test_what_a_hook_sparsified_is_not_sparsified_again() -> None:
    generator, twin = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    hooked, ours, later = (torch.ones(1, 4, requires_grad=True) for _ in range(3))
    optimizer = TopQGradientOptimizer(
        [hooked, ours, later], q=0.5, dq=0.1, grad_scale=2.0, grad_bias=1.0, generator=generator
    )
    optimizer.sparsified_elsewhere([hooked])
    optimizer.sparsified_elsewhere({later: "names are not looked at"})
    for param in (hooked, ours, later):
        param.grad = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    optimizer.step()
    for param in (hooked, later):
        assert param.grad is not None
        assert param.grad.tolist() == [[3.0, 5.0, 7.0, 9.0]]
    assert ours.grad is not None
    assert ours.grad.tolist() == [[1.0, 1.0, 7.0, 9.0]]
    torch.rand(1, generator=twin)
    assert torch.equal(generator.get_state(), twin.get_state()), "one draw, for ours alone"


@pytest.mark.parametrize("params", [torch.ones(3), ["weight"], [None]])
def test_sparsified_elsewhere_takes_tensors_only(params: Any) -> None:
    optimizer = TopQGradientOptimizer([torch.ones(3, requires_grad=True)], q=0.5)
    with pytest.raises(TypeError, match=r"params=.*expected an iterable of tensors"):
        optimizer.sparsified_elsewhere(params)


def test_a_sparse_gradient_is_refused_by_name() -> None:
    dense = torch.ones(2, 2, requires_grad=True)
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    named = [("fc", dense), ("embedding", embedding.weight)]
    optimizer = TopQGradientOptimizer(named, q=0.5, dq=0.1, lr=1.0)
    torch.autograd.backward(embedding(torch.tensor([1])).sum())
    dense.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    before, draws = embedding.weight.detach().clone(), optimizer.generator.get_state()
    with pytest.raises(TypeError, match=r"parameter 1 of group 0 \(embedding\).*sparse_coo"):
        optimizer.step()
    assert dense.grad.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert torch.equal(dense.detach(), torch.ones(2, 2))
    assert torch.equal(embedding.weight.detach(), before)
    assert torch.equal(optimizer.generator.get_state(), draws)


def test_the_signature_is_the_seeds() -> None:
    parameters = inspect.signature(TopQGradientOptimizer).parameters
    assert list(parameters) == [
        "params",
        "InnerOpt",
        "q",
        "dq",
        "param_ndim",
        "grad_scale",
        "grad_bias",
        "defaults",
        "generator",
        "inner_opt_kwargs",
    ]
    assert "q: 'float' = <required parameter>" in str(inspect.signature(TopQGradientOptimizer))
    assert parameters["generator"].default is torch.default_generator

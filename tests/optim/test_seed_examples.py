"""The two worked examples of the seed, number for number."""

from __future__ import annotations

import pytest
import torch

from topq_dist.optim import TopQGradientOptimizer

GRADIENT = [[0.5, 1.0], [-2.5, 0.30]]

# q -> the gradient after a step with lr=1, and the parameter, which started at one
WHOLE_TENSOR = {
    0.0: ([[0.5, 1.0], [-2.5, 0.3]], [[0.5, 0.0], [3.5, 0.7]]),
    0.25: ([[0.5, 1.0], [-2.5, 0.0]], [[0.5, 0.0], [3.5, 1.0]]),
    0.5: ([[0.0, 1.0], [-2.5, 0.0]], [[1.0, 0.0], [3.5, 1.0]]),
    0.75: ([[0.0, 0.0], [-2.5, 0.0]], [[1.0, 1.0], [3.5, 1.0]]),
    1.0: ([[0.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]),
}
EACH_ROW = {
    0.0: ([[0.5, 1.0], [-2.5, 0.3]], [[0.5, 0.0], [3.5, 0.7]]),
    0.5: ([[0.0, 1.0], [-2.5, 0.0]], [[1.0, 0.0], [3.5, 1.0]]),
    1.0: ([[0.0, 0.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]),
}


@pytest.mark.parametrize(
    ("param_ndim", "q", "gradient", "parameter"),
    [(None, q, *printed) for q, printed in WHOLE_TENSOR.items()]
    + [(1, q, *printed) for q, printed in EACH_ROW.items()],
)
def test_the_seed_prints_these(
    param_ndim: int | None, q: float, gradient: list[list[float]], parameter: list[list[float]]
) -> None:
    x = torch.ones((2, 2), requires_grad=True)
    optim = TopQGradientOptimizer(params=[x], lr=1.0, q=q, param_ndim=param_ndim)
    torch.autograd.backward(x, torch.tensor(GRADIENT))
    optim.step()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.tensor(gradient))
    assert torch.equal(x.detach(), torch.tensor(parameter))

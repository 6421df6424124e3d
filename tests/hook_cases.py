"""Models, batches and a single-process reference shared by the hook's tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor, nn

from topq_dist.exchange.registry import ExchangeName
from topq_dist.sparsity import k_from_q, row_shape

# all but the one that chooses among them
EXCHANGES: tuple[ExchangeName, ...] = tuple(n for n in get_args(ExchangeName) if n != "auto")
Choose = Callable[[str, Tensor], tuple[int, int, int]]


def small_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(13, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 5)
    ).to(dtype)


def batch(step: int, rank: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    inputs = torch.randn(8, 13, generator=generator)
    return inputs.to(dtype), torch.randint(0, 5, (8,), generator=generator)


def loss_of(model: nn.Module, step: int, rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    inputs, targets = batch(step, rank, dtype)
    return nn.functional.cross_entropy(model(inputs), targets)


def keep_top(matrix: Tensor, kept: int) -> Tensor:
    """Zero all but the `kept` largest magnitudes of each row, of equal ones the first."""
    top = matrix.abs().sort(dim=1, descending=True, stable=True).indices[:, :kept]
    return torch.zeros_like(matrix).scatter(1, top, matrix.gather(1, top))


def whole(q: float) -> Choose:
    """Top-Q of a whole parameter, at least one element, as the unpaired hook keeps."""
    return lambda _, p: (1, p.numel(), max(1, k_from_q(q, p.numel())))


def by_rows(q: float, param_ndim: int | None) -> Choose:
    """Top-Q as a TopQGradientOptimizer keeps."""

    def choose(_: str, parameter: Tensor) -> tuple[int, int, int]:
        rows, row_numel = row_shape(parameter.shape, param_ndim)
        return rows, row_numel, k_from_q(q, row_numel)

    return choose


class Reference:
    """The numbers that W ranks with the hook must arrive at, computed in one process."""

    def __init__(
        self, model: nn.Module, world_size: int, choose: Choose, *, error_feedback: bool
    ) -> None:
        self.model = model
        self.world_size = world_size
        self.choose = choose
        self.error_feedback = error_feedback
        self.residuals: list[dict[str, Tensor]] = [{} for _ in range(world_size)]

    def backward(self, step: int) -> None:
        """Leave the average of every rank's masked gradient in the model's parameters."""
        averages: dict[str, Tensor] = {}
        for rank in range(self.world_size):
            self.model.zero_grad()
            loss_of(self.model, step, rank).backward()  # type: ignore[no-untyped-call]
            for name, parameter in self.model.named_parameters():
                assert parameter.grad is not None
                sent = self._send(rank, name, parameter, parameter.grad)
                share = sent / self.world_size
                averages[name] = averages[name] + share if rank else share
        for name, parameter in self.model.named_parameters():
            parameter.grad = averages[name]

    def _send(self, rank: int, name: str, parameter: Tensor, gradient: Tensor) -> Tensor:
        residual = self.residuals[rank].get(name)
        if self.error_feedback and residual is not None:
            gradient = gradient + residual
        rows, row_numel, kept = self.choose(name, parameter)
        sent = keep_top(gradient.reshape(rows, row_numel), kept).view_as(gradient)
        if self.error_feedback:
            self.residuals[rank][name] = gradient - sent
        return sent

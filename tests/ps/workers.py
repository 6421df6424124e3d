"""Workers for tests: a small model, batches by worker and step, and threads that train it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Work = Callable[[int], Any]
JOIN_S = 90.0


def make_model() -> nn.Sequential:
    """Return the same model each time, whoever draws random numbers meanwhile."""
    generator = torch.Generator().manual_seed(7)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(worker: int, step: int) -> tuple[Tensor, Tensor]:
    """Return a worker's inputs and targets in a step."""
    generator = torch.Generator().manual_seed(1_000 * worker + step)
    return torch.randn(5, 8, generator=generator), torch.randn(5, 4, generator=generator)


def backward(model: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Leave the gradient of the mean loss over these batches, joined, in the model."""
    inputs = torch.cat([pair[0] for pair in pairs])
    targets = torch.cat([pair[1] for pair in pairs])
    loss = nn.functional.mse_loss(model(inputs), targets)
    torch.autograd.backward(loss)
    return loss.detach()


def values(model: nn.Module) -> Tensor:
    """Return all parameters as one vector, copied."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def side_by_side(count: int, work: Work, *, within_s: float = JOIN_S) -> list[Any]:
    """Return work(0), work(1), ..., each of which ran in a thread; raises the first error."""
    results: list[Any] = [None] * count
    errors: list[BaseException] = []

    def run(worker: int) -> None:
        try:
            results[worker] = work(worker)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(worker,), daemon=True) for worker in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(within_s)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a worker hangs"
    return results

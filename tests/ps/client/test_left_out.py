"""The rest of a model, which no server holds: frozen parameters and buffers are named, once."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from ps.client.test_optimizer import ADAMW, PLAIN, connect
from ps.servers import serving
from torch import Tensor, nn

from topq_dist.ps import ParameterServerOptimizer
from topq_dist.ps.client.left_out import module_of


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING)
    return lambda: [r.message for r in caplog.records if r.name.endswith("left_out")]


class Statistic(nn.Module):
    """A buffer that is saved, one that is not, and one of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.zeros(2))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))


def test_a_parameter_freed_later_is_named_once(
    tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    layers = [nn.Linear(2, 2) for _ in range(4)]
    model = nn.Sequential(*layers)
    for layer in layers[:3]:
        layer.requires_grad_(False)
    with serving(tmp_path, PLAIN) as server, connect(model, server) as optimizer:
        for step, freed in enumerate((None, 0, None, 1, None)):
            if freed is not None:
                layers[freed].requires_grad_(True)
            optimizer.zero_grad()
            torch.autograd.backward(model(torch.ones(1, 2)).sum())
            optimizer.step()
            assert len(said()) == (0, 1, 1, 2, 2)[step]
    assert "'0.weight', '0.bias' need a gradient now, and do not train" in said()[0]
    assert "'1.weight', '1.bias' need a gradient now" in said()[1]


def test_what_is_frozen_afterwards_stays_and_trains_again_once_it_is_freed(
    tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    """The warning's remedy, which is what torch's optimizers do."""
    torch.manual_seed(0)
    alone, model = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))
    alone.load_state_dict(model.state_dict())
    reference = torch.optim.AdamW(alone.parameters(), **ADAMW["options"])
    with serving(tmp_path, ADAMW) as server, connect(model, server) as optimizer:
        for step in range(9):
            for net, each in ((alone, reference), (model, optimizer)):
                net[0].requires_grad_(step // 3 % 2 == 1)
                each.zero_grad()
                torch.autograd.backward(net(torch.full((2, 3), step + 1.0)).square().mean())
                weight = net.get_parameter("0.weight")
                before = weight.detach().clone()
                each.step()
                assert torch.equal(before, weight) == (step // 3 % 2 == 0)
            for one, other in zip(alone.parameters(), model.parameters(), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not said()


def test_buffers_that_stay_a_workers_own_are_named(
    tmp_path: Path, said: Callable[[], list[str]]
) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), Statistic())
    with serving(tmp_path, PLAIN) as server, connect(model, server) as optimizer:
        (warning,) = said()
        assert "'1.running_mean', '1.running_var', '2.level' stay this worker's own" in warning
        assert "torch.optim.swa_utils.update_bn(loader, model)" in warning
        optimizer.step()
    assert len(said()) == 1


def test_the_remedy_for_buffers_works(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(16, 4) * 3 + 2 for _ in range(20)]
    first, late = (
        nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)) for _ in range(2)
    )
    with serving(tmp_path, PLAIN) as server, connect(first, server) as optimizer:
        for inputs in batches:
            optimizer.zero_grad()
            torch.autograd.backward((first(inputs) - 1).square().mean())
            optimizer.step()
        with connect(late, server, worker=1):
            for model in (first, late):
                torch.optim.swa_utils.update_bn(batches, model)
                model.eval()
            torch.testing.assert_close(first(batches[0]), late(batches[0]))


def test_a_long_list_is_cut(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    model = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(9)))
    with serving(tmp_path, PLAIN) as server, connect(model, server):
        assert "'3.running_var' and 10 more stay" in said()[0]


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)),
        nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False)),
    ],
)
def test_a_model_without_such_buffers_hears_nothing(
    tmp_path: Path, model: nn.Module, said: Callable[[], list[str]]
) -> None:
    with serving(tmp_path, PLAIN) as server, connect(model, server):
        assert not said()


def test_the_module_is_known_by_its_own_generator_alone() -> None:
    class Renaming(nn.Linear):
        def named_parameters(self, *_: Any, **__: Any) -> Any:
            yield from super().named_parameters()

    model = nn.Linear(2, 2)
    begun = model.named_parameters()
    next(begun)
    assert module_of(model.named_parameters()) is model
    assert module_of(nn.Sequential(model).named_parameters(prefix="x")) is not None
    unknown: list[Iterable[tuple[str, Tensor]]] = [
        list(model.named_parameters()),
        (pair for pair in model.named_parameters()),
        Renaming(2, 2).named_parameters(),
        iter(()),
    ]
    assert all(module_of(one) is None for one in unknown)


def test_a_list_of_parameters_is_as_good(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with serving(tmp_path, PLAIN) as server, warnings.catch_warnings():
        warnings.simplefilter("error")
        named = list(model.named_parameters())
        ParameterServerOptimizer(named, str(server.address), worker="a", timeout_s=30).close()
    assert not said()

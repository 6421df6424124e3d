"""Every row of docs/compatibility.md is made by a test: one of these, or one that it points to."""

from __future__ import annotations

import ast
import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from compatibility_page import ROOT, cases_of, outcome_of, rows
from hook_cases import loss_of, small_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, Optimizer, lr_scheduler, swa_utils

from topq_dist import register_topq_hook

HERE = "tests/ddp/test_compatibility.py"


def test_the_page_has_rows_and_each_has_its_test() -> None:
    assert len(rows()) > 60
    for row in rows():
        if row.outcome.startswith("not tried"):
            assert row.test == "-", row
            continue
        path, _, name = row.test.strip("`").partition("::")
        tree = ast.parse((ROOT / path).read_text())
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name.partition("[")[0] in names, row
        kind, _, words = row.outcome.partition(": ")
        assert kind in ("works", "works, and warns", "refused"), row
        assert any(words.strip("`") in text for text in texts_of_the_package()), row


@functools.cache
def texts_of_the_package() -> list[str]:
    trees = [ast.parse(path.read_text()) for path in (ROOT / "topq_dist").rglob("*.py")]
    constants = [
        node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)
    ]
    return [node.value for node in constants if isinstance(node.value, str)]


def test_every_case_of_this_file_has_its_row_with_its_outcome() -> None:
    assert cases_of(HERE) == OPTIMIZERS.keys() | SCHEDULERS.keys() | MODES.keys()


def check(what: str, action: Callable[[], object]) -> None:
    kind, words = outcome_of(what, HERE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if kind == "refused":
            with pytest.raises((TypeError, ValueError, RuntimeError), match=re.escape(words)):
                action()
            return
        action()
    said = "\n".join(str(one.message) for one in caught if "topq" in str(one.message))
    assert (kind == "works, and warns") == bool(said), said
    assert words in said


def hooked(
    make: Callable[[Any], Optimizer], module: nn.Module | None = None, **options: Any
) -> tuple[DistributedDataParallel, Optimizer]:
    model = DistributedDataParallel(module or small_model(), **options)
    optimizer = make(model.parameters())
    register_topq_hook(model, optimizer, q=0.9, exchange="allgather")
    return model, optimizer


def steps_of(
    model: nn.Module, optimizer: Optimizer, after: Callable[[], Any] | None = None
) -> None:
    before = [one.detach().clone() for one in model.parameters()]
    for step in range(4):

        def closure(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step, 0)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        if after is not None:
            after()
    assert all(bool(one.isfinite().all()) for one in model.parameters())
    assert any(
        not torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True)
    )


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "Adam": lambda p: Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.01, max_iter=2),
}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("what", OPTIMIZERS)
def test_optimizers(what: str) -> None:
    check(what, lambda: steps_of(*hooked(OPTIMIZERS[what])))


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=2),
}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("what", SCHEDULERS)
def test_schedulers(what: str) -> None:
    """The same values in the groups as without the hook, momentum among them, at every step."""

    def action() -> None:
        model, optimizer = hooked(OPTIMIZERS["SGD"])
        plain: Optimizer = SGD(small_model().parameters(), lr=0.01, momentum=0.9, nesterov=True)
        schedules = [SCHEDULERS[what](one) for one in (optimizer, plain)]

        def after() -> None:
            plain.step()
            for schedule in schedules:
                schedule.step()
            mine, other = (
                {key: value for key, value in one.param_groups[0].items() if key != "params"}
                for one in (optimizer, plain)
            )
            assert mine == other

        steps_of(model, optimizer, after)

    check(what, action)


class Changed(nn.Module):
    """A small model that another thing is done to."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = small_model(dtype=dtype)
        self.dtype = dtype

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(inputs.to(self.dtype)).float()
        return out


class WithNorm(nn.Module):
    """Statistics that travel as DDP says, and a parameter in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(13, 13), nn.BatchNorm1d(13), nn.Linear(13, 5)
        self.tied = self.first

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.norm(self.tied(torch.tanh(self.first(inputs)))))
        return out


def mode(**options: Any) -> Callable[[], object]:
    return lambda: steps_of(*hooked(OPTIMIZERS["SGD"], **options))


def of_dtype(dtype: torch.dtype) -> Callable[[], object]:
    return lambda: steps_of(*hooked(OPTIMIZERS["SGD"], Changed(dtype)))


def two_models() -> None:
    first, second = hooked(OPTIMIZERS["SGD"]), hooked(OPTIMIZERS["Adam"])
    for model, optimizer in (first, second, first, second):
        steps_of(model, optimizer)


def checkpointed() -> None:
    module = small_model()
    whole = nn.Sequential(Recomputing(module[:2]), module[2:])
    steps_of(*hooked(OPTIMIZERS["SGD"], whole))


class Recomputing(nn.Module):
    """Recomputes its activations in the backward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        kept: Any = torch.utils.checkpoint.checkpoint(self.inner, inputs, use_reentrant=False)
        out: torch.Tensor = kept
        return out


MODES: dict[str, Callable[[], object]] = {
    "broadcast_buffers=False": lambda: steps_of(
        *hooked(OPTIMIZERS["SGD"], WithNorm(), broadcast_buffers=False)
    ),
    "BatchNorm, and a layer in two places": lambda: steps_of(
        *hooked(OPTIMIZERS["SGD"], WithNorm())
    ),
    "device_mesh=": lambda: mode(device_mesh=init_device_mesh("cpu", (1,)))(),
    "bucket_cap_mb=": mode(bucket_cap_mb=0.001),
    "several models with a hook each": two_models,
    "activation checkpointing": checkpointed,
    "float32": of_dtype(torch.float32),
    "float64": of_dtype(torch.float64),
    "float16": of_dtype(torch.float16),
    "bfloat16": of_dtype(torch.bfloat16),
}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("what", MODES)
def test_modes(what: str) -> None:
    assert dist.is_initialized()
    check(what, MODES[what])

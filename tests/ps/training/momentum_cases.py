"""Inner optimizers with a momentum, pushes sparse and dense, and a worker that sends them."""

from __future__ import annotations

from typing import Any

import torch
from ps.servers import Options
from ps.training.test_central import push_of, random_gradients
from torch import Tensor

from topq_dist.compress.aggregate import write_sum
from topq_dist.ps import ParameterServerOptimizer
from topq_dist.ps.model.flat import FlatModel
from topq_dist.ps.protocol.config import TrainingConfig
from topq_dist.ps.protocol.types import Push
from topq_dist.ps.training.central import CentralModel

SPARSE, DENSE = 0.9, 0.0  # q of a step's pushes

SGD: Options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.25}
NESTEROV: Options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
# by inner optimizer and its options: what it is to step with while pushes are sparse
CASES: dict[str, tuple[type[torch.optim.Optimizer], Options, Options]] = {
    "sgd": (torch.optim.SGD, SGD, {"lr": 0.1 * ((1 - 0.25) / (1 - 0.9)), "momentum": 0.0}),
    "nesterov": (
        torch.optim.SGD,
        NESTEROV,
        {"lr": 0.1 * (1 / (1 - 0.9)), "momentum": 0.0, "nesterov": False},
    ),
    "rmsprop": (
        torch.optim.RMSprop,
        {"lr": 0.01, "momentum": 0.5},
        {"lr": 0.01 * (1 / (1 - 0.5)), "momentum": 0.0},
    ),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}, {"betas": (0.0, 0.999)}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01, "betas": (0.8, 0.99)}, {"betas": (0.0, 0.99)}),
    "adamax": (torch.optim.Adamax, {"lr": 0.01}, {"betas": (0.0, 0.999)}),
}


def central_of(case: str, model: FlatModel, **training: Any) -> CentralModel:
    cls, options, _ = CASES[case]
    config = TrainingConfig(inner_opt=cls.__name__, options=options, **training)
    return CentralModel(config, model.spec, model)


def pushes_at(model: FlatModel, generator: torch.Generator, *qs: float) -> list[Push]:
    return [push_of(model, random_gradients(model, generator), q=q) for q in qs]


def gradients_of(push: Push, model: FlatModel) -> dict[str, Tensor]:
    gradient = FlatModel(model.spec)
    for place, flat in enumerate(gradient.flats):
        write_sum([push.frames[place]], divisor=1, out=flat)
    return gradient.tensors()


def connect(model: torch.nn.Module, address: object, **knobs: Any) -> ParameterServerOptimizer:
    exact = {"q": 0.0, "value_format": None, "bound": None}
    knobs = {**exact, "worker": "w0", "timeout_s": 30, **knobs}
    return ParameterServerOptimizer(model.named_parameters(), str(address), **knobs)

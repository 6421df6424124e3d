"""The tasks: what is trained on what, with which rates, and how it is tested."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from networks import Cnn, Gpt, Lstm, Mlp, SkipGram
from torch import Tensor, nn
from torch.nn import functional

Quality = Literal["accuracy", "loss"]
OptimizerName = Literal["sgd", "adamw"]
_WINDOWS = 1200


@dataclass(frozen=True, kw_only=True)
class Task:
    """One line of the report.

    data: its name in datasets.py. batch: samples of a worker in a step. context: characters of a
    sample, None for images. lr: the peak rate with the optimizer's usual momentum. quality: what is
    reported, accuracy in per cent or loss in nats. schedule: "cosine" is 5 % of warm-up, then a
    cosine down to a twentieth; "onecycle" is torch's OneCycleLR, which cycles momentum too.
    """

    name: str
    data: str
    model: Callable[[Any], nn.Module]
    batch: int
    optimizer: OptimizerName
    lr: float
    weight_decay: float
    quality: Quality
    context: int | None = None
    schedule: Literal["cosine", "onecycle"] = "cosine"
    flip: bool = False

    def make_optimizer(
        self, model: nn.Module, *, lr: float, momentum: float
    ) -> torch.optim.Optimizer:
        """Return the optimizer, with this momentum or beta1."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                model.parameters(), lr=lr, momentum=momentum, weight_decay=self.weight_decay
            )
        return torch.optim.AdamW(
            model.parameters(), lr=lr, betas=(momentum, 0.999), weight_decay=self.weight_decay
        )


def _gpt(
    layers: int, width: int, context: int, *, tied: bool = False
) -> Callable[[Any], nn.Module]:
    def make(data: datasets.Text) -> nn.Module:
        return Gpt(
            vocabulary=data.vocabulary, layers=layers, width=width, context=context, tied=tied
        )

    return make


_ADAMW: dict[str, Any] = {"optimizer": "adamw", "weight_decay": 0.01, "quality": "loss"}
_IMAGES: dict[str, Any] = {"data": "cifar10", "batch": 8, "quality": "accuracy", "flip": True}
TASKS = {
    task.name: task
    for task in (
        Task(
            name="cifar10-sgd",
            model=lambda data: Cnn(channels=3),
            optimizer="sgd",
            lr=0.05,
            weight_decay=5e-4,
            **_IMAGES,
        ),
        Task(
            name="cifar10-adamw",
            model=lambda data: Cnn(channels=3),
            optimizer="adamw",
            lr=2e-3,
            weight_decay=0.01,
            **_IMAGES,
        ),
        Task(
            name="gpt-moby",
            data="moby-dick",
            model=_gpt(2, 128, 64),
            batch=2,
            lr=3e-3,
            context=64,
            **_ADAMW,
        ),
        Task(
            name="gpt-shakespeare",
            data="shakespeare",
            model=_gpt(3, 96, 96),
            batch=4,
            lr=3e-3,
            context=96,
            **_ADAMW,
        ),
        Task(
            name="tied-onecycle",
            data="moby-dick",
            model=_gpt(2, 64, 32, tied=True),
            batch=4,
            lr=3e-3,
            context=32,
            schedule="onecycle",
            **_ADAMW,
        ),
        Task(
            name="fashion-sgd",
            data="fashion-mnist",
            model=lambda data: Cnn(channels=1),
            batch=8,
            optimizer="sgd",
            lr=0.05,
            weight_decay=5e-4,
            quality="accuracy",
        ),
        Task(
            name="digits-sgd",
            data="digits",
            model=lambda data: Mlp(features=64),
            batch=16,
            optimizer="sgd",
            lr=0.05,
            weight_decay=5e-4,
            quality="accuracy",
        ),
        Task(
            name="tied-cycles",
            data="cycles",
            model=_gpt(2, 64, 32, tied=True),
            batch=8,
            lr=3e-3,
            context=32,
            schedule="onecycle",
            **_ADAMW,
        ),
        Task(
            name="recommender",
            data="moby-words",
            model=lambda data: SkipGram(items=data.vocabulary),
            batch=8,
            lr=3e-3,
            context=16,
            **_ADAMW,
        ),
        Task(
            name="lstm-moby",
            data="moby-dick",
            model=lambda data: Lstm(vocabulary=data.vocabulary),
            batch=4,
            lr=3e-3,
            context=64,
            **_ADAMW,
        ),
    )
}


class Batches:
    """Each worker's samples of a step: a pure function of seed, step and worker."""

    def __init__(self, task: Task, data: Any, *, seed: int, workers: int, steps: int) -> None:
        self._task, self._data, self._workers = task, data, workers
        generator = torch.Generator().manual_seed(1000 + seed)
        train = data.train if task.context else data.train[0]
        size = len(train) - (task.context + 1 if task.context else 0)
        count = steps * workers * task.batch
        drawn = [torch.randperm(size, generator=generator) for _ in range(-(-count // size))]
        self._order = torch.cat(drawn)[:count].view(steps, workers, task.batch)
        self._flips = torch.rand(self._order.shape, generator=generator) < 0.5

    def take(self, step: int, worker: int) -> tuple[Tensor, Tensor]:
        """Return (inputs, targets)."""
        at = self._order[step, worker]
        if self._task.context:
            where = at[:, None] + torch.arange(self._task.context)
            return self._data.train[where], self._data.train[where + 1]
        images = self._data.train[0][at]
        if self._task.flip:
            mirrored = self._flips[step, worker][:, None, None, None]
            images = torch.where(mirrored, images.flip(-1), images)
        return images, self._data.train[1][at]


def load_data(task: Task, folder: Path = datasets.FOLDER) -> Any:
    """Return the data of a task."""
    return datasets.load(task.data, folder)


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats."""
    return functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


@torch.no_grad()
def evaluate(
    task: Task,
    model: nn.Module,
    data: Any,
    part: Literal["validation", "test"],
    *,
    limit: int | None = None,
) -> float:
    """Return the quality on a part of the data: accuracy in per cent, or loss in nats.

    limit: at most so many samples, for a curve on the way.
    """
    model.eval()
    held_out = getattr(data, part)
    if task.context is None:
        images, labels = (whole[:limit] for whole in held_out)
        right = sum(
            int((model(images[at : at + 250]).argmax(-1) == labels[at : at + 250]).sum())
            for at in range(0, len(images), 250)
        )
        quality = 100.0 * right / len(images)
    else:
        count = min(_WINDOWS, limit or _WINDOWS)
        starts = torch.linspace(0, len(held_out) - task.context - 2, count).long()
        where = starts[:, None] + torch.arange(task.context)
        batches = [where[first : first + 40] for first in range(0, count, 40)]
        losses = [float(loss_of(model, held_out[at], held_out[at + 1])) for at in batches]
        quality = sum(map(lambda loss, at: loss * len(at), losses, batches)) / count
    model.train()
    return quality

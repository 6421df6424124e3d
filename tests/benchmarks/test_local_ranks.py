"""The report's ranks with local steps must end in the bits of LocalTopQ on real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Images, Text
from emulated_ranks import Method, make_scheduler
from local_ranks import LocalRanks
from networks import Cnn, Gpt
from ranks import run_ranks
from tasks import Batches, Task, loss_of
from torch import Tensor, nn

from topq_dist import LocalTopQ

pytestmark = [pytest.mark.gloo, pytest.mark.usefixtures("one_thread")]
WORLD_SIZE, STEPS, SEED = 2, 7, 3
STREAMED: dict[str, Any] = {"fragments": 3, "overlap": 2}
# model, and the method
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt": ("gpt", {"every": 3, "q": 0.9, "bound": 1.0, "residual_decay": 1.0, "outer_lr": 2.0}),
    "gpt streamed": ("gpt", {"every": 4, "q": 0.9, "bound": None, **STREAMED}),
    "gpt blended": ("gpt", {"every": 4, "q": 0.9, "bound": 1.0, "blend": 0.5, **STREAMED}),
    "cnn": ("cnn", {"every": 2, "q": 0.9, "beta": 0.0, "lr": 2.0, "bound": None}),
    "cnn dense": (
        "cnn",
        {
            "every": 3,
            "q": 0.0,
            "value_format": "fp32",
            "bound": None,
            "outer_lr": 0.7,
            "outer_momentum": 0.9,
            "nesterov": True,
        },
    ),
}


def task_and_data(model: str) -> tuple[Task, Any]:
    generator = torch.Generator().manual_seed(SEED)
    if model == "gpt":
        text = torch.randint(20, (200,), generator=generator)
        data: Any = Text(vocabulary=20, train=text, validation=text, test=text)
    else:
        pixels = torch.randint(256, (32, 1, 12, 12), generator=generator, dtype=torch.uint8)
        images = pixels, torch.randint(10, (32,), generator=generator)
        data = Images(train=images, validation=images, test=images)
    made = {
        "gpt": lambda data: Gpt(vocabulary=data.vocabulary, layers=1, width=16, context=8),
        "cnn": lambda data: Cnn(channels=1),
    }
    task = Task(
        name="small",
        data="none",
        model=made[model],
        batch=4,
        optimizer="adamw" if model == "gpt" else "sgd",
        lr=0.003 if model == "gpt" else 0.05,
        weight_decay=0.01,
        quality="loss",
        context=8 if model == "gpt" else None,
    )
    return task, data


def numbers(model: nn.Module) -> Tensor:
    tensors = [*model.parameters(), *model.buffers()]
    return torch.cat([one.detach().flatten().double() for one in tensors])


def on_real_ranks(rank: int) -> dict[str, tuple[Tensor, Tensor, int]]:
    results = {}
    for name, (kind, options) in CASES.items():
        task, data = task_and_data(kind)
        method = Method(name="", kind="local", **options)
        batches = Batches(task, data, seed=SEED, workers=WORLD_SIZE, steps=STEPS)
        torch.manual_seed(SEED)
        model = task.model(data)
        optimizer = task.make_optimizer(model, lr=task.lr * method.lr, momentum=method.beta)
        scheduler = make_scheduler(task, optimizer, STEPS)
        ours = {key: value for key, value in options.items() if key not in ("beta", "lr")}
        steps = LocalTopQ(model, optimizer, **ours)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, *batches.take(step, rank)).backward()  # type: ignore[no-untyped-call]
            steps.step()
            scheduler.step()
        trained = numbers(model)
        steps.synchronize()
        results[name] = (trained, numbers(model), steps.stats().sent_bytes)
    return results


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[Tensor, Tensor, int]]]:
    return run_ranks(WORLD_SIZE, on_real_ranks, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_emulated_local_steps_are_real_ones(
    name: str, real: list[dict[str, tuple[Tensor, Tensor, int]]]
) -> None:
    kind, options = CASES[name]
    task, data = task_and_data(kind)
    method = Method(name="", kind="local", **options)
    batches = Batches(task, data, seed=SEED, workers=WORLD_SIZE, steps=STEPS)
    torch.manual_seed(SEED)
    model = task.model(data)
    group = LocalRanks(task, model, method, workers=WORLD_SIZE, steps=STEPS)
    before = numbers(model)
    for step in range(STEPS):
        group.step([batches.take(step, rank) for rank in range(WORLD_SIZE)], step)
    ours = numbers(model)
    assert not torch.equal(ours, before)
    assert torch.equal(ours, real[0][name][0])
    group.synchronize()
    for answer in real:
        assert torch.equal(numbers(model), answer[name][1])
    # on real ranks slots have a head and room, and the first frames of each bucket are sent twice
    assert group.sent_bytes < real[1][name][2] < 2.2 * group.sent_bytes + 1000 * STEPS

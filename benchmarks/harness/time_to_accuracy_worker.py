"""One rank of the time-to-accuracy benchmark: trains once, as the JSON in its argument says.

Started by time_to_accuracy.py on each host, anew for every run, so that what a method loads,
compiles or tries out in its first steps is on its clock. Leaves its Outcome in the job's folder.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))

import torch
import torch.distributed as dist
from datasets import Images
from networks import Flat
from tasks import Batches, Task, evaluate, load_data, loss_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

import topq_dist
from harness.baselines import HOOKS
from harness.counters import interface_sent_bytes

WORLD_SIZE = 2
COLLECTIVE_TIMEOUT_S = 120
WARM_UP_FRACTION, LAST_RATE = 0.05, 0.05
TOPQ, TOPQ_ALLGATHER = "topq", "topq_allgather"
BASELINES = ("dense", "fp16", "powersgd1", "powersgd4")
TITLES = {name: HOOKS[name].title for name in BASELINES} | {
    TOPQ: "topq_dist, defaults",
    TOPQ_ALLGATHER: "topq_dist, allgather",
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The training, the same for every method.

    data: its name in experiments/datasets.py. batch: images of a rank in a step. hidden: widths
    between the pixels and the ten classes. lr: SGD's peak rate, with 5 % of warm-up before it and
    a cosine down to a twentieth after it. evaluate_every: steps between two looks at the first
    `test_images` of the test part.
    """

    data: str
    hidden: tuple[int, ...]
    batch: int
    lr: float
    momentum: float
    steps: int
    evaluate_every: int
    test_images: int

    def rate_factor(self, step: int) -> float:
        """Return the part of the peak rate that step `step`, from 0, is taken at."""
        warm = max(1, round(WARM_UP_FRACTION * self.steps))
        if step < warm:
            return (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        return LAST_RATE + (1.0 - LAST_RATE) * 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True, kw_only=True)
class Job:
    """The part of one rank: the first `run_steps` steps of a recipe, with a method and a seed.

    interface: what this rank alone sends by, None where it is not alone.
    """

    recipe: Recipe
    method: str
    seed: int
    run_steps: int
    rank: int = 0
    folder: str = ""
    interface: str | None = None

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Return what `json.dumps(asdict(job))` was made from."""
        fields = json.loads(text)
        return cls(**{**fields, "recipe": Recipe(**fields["recipe"])})

    def answer_path(self) -> Path:
        """Return where this rank's Outcome is left."""
        return Path(self.folder) / f"{self.rank}.json"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The account of one rank: seconds of each step, then lists with an entry an evaluation.

    accuracy: per cent right of this rank's share of the test images; shares are equally large.
    training_s and sent_bytes count from the start; the latter is what left the interface, TCP's
    acknowledgements included, and empty where there is none of the rank's own.
    """

    parameters: int
    step_s: list[float]
    steps: list[int]
    training_s: list[float]
    accuracy: list[float]
    sent_bytes: list[int]
    chosen_exchange: str | None


class Training:
    """A model under a method, its optimizer and schedule, and this rank's part of the data."""

    def __init__(self, job: Job) -> None:
        recipe = job.recipe
        self.task = Task(
            name="time-to-accuracy",
            data=recipe.data,
            model=lambda data: build_model(recipe, data),
            batch=recipe.batch,
            optimizer="sgd",
            lr=recipe.lr,
            weight_decay=0.0,
            quality="accuracy",
        )
        self.data = load_data(self.task)
        self.batches = Batches(
            self.task, self.data, seed=job.seed, workers=WORLD_SIZE, steps=recipe.steps
        )
        torch.manual_seed(job.seed)
        self.model = DistributedDataParallel(
            self.task.model(self.data),
            bucket_cap_mb=HOOKS[job.method].bucket_cap_mb,
            # the seed is the same everywhere, and this would send the whole model
            init_sync=False,
        )
        self.optimizer = self.task.make_optimizer(
            self.model, lr=recipe.lr, momentum=recipe.momentum
        )
        self.scheduler = LambdaLR(self.optimizer, recipe.rate_factor)
        self.state = register(job.method, self.model, self.optimizer)
        self.rank = job.rank
        self.shown = replace(self.data, test=share(self.data, job))

    def step(self, number: int) -> None:
        """Take one step."""
        inputs, targets = self.batches.take(number, self.rank)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss_of(self.model, inputs, targets))
        self.optimizer.step()
        self.scheduler.step()

    def accuracy(self) -> float:
        """Return the per cent of this rank's share of the test images that come out right."""
        return evaluate(self.task, self.model.module, self.shown, "test")


def build_model(recipe: Recipe, data: Images) -> nn.Sequential:
    """Return an MLP with ReLU between its layers, for the data's images."""
    widths = (data.train[0][0].numel(), *recipe.hidden, 10)
    layers: list[nn.Module] = [Flat()]
    for width, next_width in pairwise(widths):
        layers += [nn.Linear(width, next_width), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def register(
    method: str, model: DistributedDataParallel, optimizer: torch.optim.Optimizer
) -> topq_dist.TopQState | None:
    """Put the model under a method; ours with nothing set but, to compare, the exchange."""
    if method == TOPQ:
        return topq_dist.register_topq_hook(model, optimizer)
    if method == TOPQ_ALLGATHER:
        return topq_dist.register_topq_hook(model, optimizer, exchange="allgather")
    return HOOKS[method].register(model)


def share(data: Images, job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's share of the first test images: replicas are equal, so two test faster."""
    images, labels = data.test
    count = min(job.recipe.test_images, len(images)) // WORLD_SIZE * WORLD_SIZE
    return images[job.rank : count : WORLD_SIZE], labels[job.rank : count : WORLD_SIZE]


def train(job: Job) -> Outcome:
    """Train in a process group of its own; every rank must be given the same job but its rank.

    Raises KeyError for a method that is none.
    """
    # not in the group, where the others would take this rank for a lost one
    HOOKS[job.method]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{job.folder}/store",
        rank=job.rank,
        world_size=WORLD_SIZE,
        timeout=dt.timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    try:
        return _train(job)
    finally:
        dist.destroy_process_group()


def _train(job: Job) -> Outcome:
    recipe, training = job.recipe, Training(job)
    step_s: list[float] = []
    points: list[dict[str, Any]] = []
    sent_before = _sent_bytes(job)
    began_s = _barrier_s()
    for number in range(job.run_steps):
        training.step(number)
        ended_s = time.perf_counter()
        step_s.append(ended_s - began_s)
        began_s = ended_s
        done = number + 1
        if done % recipe.evaluate_every == 0 or done == job.run_steps:
            points.append(
                {
                    "steps": done,
                    "training_s": sum(step_s),
                    "accuracy": training.accuracy(),
                    "sent_bytes": _sent_bytes(job) - sent_before,
                }
            )
            # the clock goes on when all ranks have evaluated
            began_s = _barrier_s()
    return Outcome(
        parameters=sum(parameter.numel() for parameter in training.model.parameters()),
        step_s=step_s,
        **{name: [point[name] for point in points] for name in ("steps", "training_s", "accuracy")},
        sent_bytes=[point["sent_bytes"] for point in points if job.interface is not None],
        chosen_exchange=None if training.state is None else training.state.chosen_exchange,
    )


def _sent_bytes(job: Job) -> int:
    return 0 if job.interface is None else interface_sent_bytes(job.interface)


def _barrier_s() -> float:
    dist.barrier()
    return time.perf_counter()


def main() -> None:
    torch.set_num_threads(1)
    job = Job.from_json(sys.argv[1])
    job.answer_path().write_text(json.dumps(asdict(train(job))))


if __name__ == "__main__":
    main()

"""The models, and the optimizers of torch.optim that a plain training loop can use.

An MLP for digits, a small CNN for Fashion-MNIST, a small GPT for text.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.data import CONTEXT, Data
from training.settings import Training

EVALUATION_BATCH = 64
# a closure, sparse gradients, matrices only: not what a plain loop over any model has to offer
_UNFIT = {"LBFGS", "SparseAdam", "Muon"}

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    name.lower(): candidate
    for name, candidate in sorted(vars(torch.optim).items(), key=lambda item: item[0].lower())
    if isinstance(candidate, type)
    and issubclass(candidate, torch.optim.Optimizer)
    and candidate is not torch.optim.Optimizer
    and name not in _UNFIT
}


def build_model(data: Data) -> nn.Module:
    """Return the model for `data`: logits (..., classes), drawn from torch's global generator."""
    if data.name == "digits":
        return Mlp(features=data.train_inputs.shape[1], classes=data.classes)
    if data.name == "fashion-mnist":
        return Cnn(classes=data.classes)
    return Gpt(vocabulary=data.classes)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats of logits (..., classes) and targets (...)."""
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
    """Return (accuracy in [0, 1], mean cross-entropy in nats) of `model` on these samples."""
    model.eval()
    correct, loss_sum = 0, 0.0
    for start in range(0, len(inputs), EVALUATION_BATCH):
        answers = targets[start : start + EVALUATION_BATCH]
        logits = model(inputs[start : start + EVALUATION_BATCH])
        correct += int((logits.argmax(dim=-1) == answers).sum())
        loss_sum += float(cross_entropy(logits, answers)) * answers.numel()
    model.train()
    return correct / targets.numel(), loss_sum / targets.numel()


def default_lr(name: str) -> float:
    """Return torch's own default learning rate of OPTIMIZERS[name]."""
    return float(inspect.signature(OPTIMIZERS[name]).parameters["lr"].default)


def set_lr(optimizer: torch.optim.Optimizer, training: Training, step: int) -> None:
    """Give all parameter groups the learning rate of `step`, where the schedule changes it."""
    if training.lr_schedule != "constant":
        for group in optimizer.param_groups:
            group["lr"] = training.lr_at(step)


class Mlp(nn.Sequential):
    """Two hidden layers over (n, features)."""

    def __init__(self, *, features: int, classes: int) -> None:
        super().__init__(
            nn.Linear(features, 1024),
            nn.ReLU(),
            nn.Linear(1024, 1024),
            nn.ReLU(),
            nn.Linear(1024, classes),
        )


class Cnn(nn.Module):
    """Two convolutions and a hidden layer over uint8 images (n, 28, 28)."""

    def __init__(self, *, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 128),
            nn.ReLU(),
            nn.Linear(128, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        # to zero mean and unit deviation, near enough for 8-bit grey
        scaled = (images.unsqueeze(1).float() - 72.9) / 90.0
        return cast("Tensor", self.layers(scaled))


class Gpt(nn.Module):
    """A causal transformer over character numbers (n, at most CONTEXT)."""

    def __init__(
        self, *, vocabulary: int, layers: int = 4, heads: int = 4, width: int = 128
    ) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(CONTEXT, width)
        nn.init.normal_(self.characters.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        positions = torch.arange(characters.shape[1], device=characters.device)
        hidden = self.characters(characters) + self.positions(positions)
        return cast("Tensor", self.head(self.norm(self.blocks(hidden))))


class Block(nn.Module):
    """Causal self-attention and an MLP, each on the normalised input and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        samples, length, width = hidden.shape
        query, key, value = (
            part.view(samples, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.query_key_value(self.attention_norm(hidden)).chunk(3, dim=2)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attention_out(mixed.transpose(1, 2).flatten(2))
        return cast("Tensor", hidden + self.mlp(self.mlp_norm(hidden)))

"""The models of the convergence report, with torch's default initial values throughout.

Block is launch/training/models.py's, copied: that one is for a user to change, and the figures of
the report must not change with it.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class Cnn(nn.Module):
    """A residual network of 118 k parameters for uint8 images (n, channels, height, width)."""

    def __init__(self, *, channels: int, classes: int = 10) -> None:
        super().__init__()
        self.first = _convolution(channels, 16, kernel=5, stride=2)
        self.second = _convolution(16, 32, kernel=3, stride=2)
        self.block1 = Residual(32)
        self.third = _convolution(32, 64, kernel=3, stride=2)
        self.block2 = Residual(64)
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = (images.float() - 120.0) / 64.0
        hidden = self.second(self.first(hidden).relu()).relu()
        hidden = self.third(self.block1(hidden)).relu()
        return cast("Tensor", self.head(self.block2(hidden).mean((-1, -2))))


class Residual(nn.Module):
    """Two convolutions whose result is added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = _convolution(channels, channels, kernel=3, stride=1)
        self.outer = _convolution(channels, channels, kernel=3, stride=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return cast("Tensor", (self.outer(self.inner(hidden).relu()) + hidden).relu())


def _convolution(channels: int, out: int, *, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out),
    )


class Mlp(nn.Sequential):
    """Two hidden layers over uint8 images."""

    def __init__(self, *, features: int, classes: int = 10) -> None:
        super().__init__(
            Flat(),
            nn.Linear(features, 512),
            nn.ReLU(),
            nn.Linear(512, 256),
            nn.ReLU(),
            nn.Linear(256, classes),
        )


class Flat(nn.Module):
    """uint8 images as vectors of about unit size."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float() / 64.0 - 1.0


class Gpt(nn.Module):
    """A causal transformer over character numbers (n, at most `context`); tied: its head is its
    embedding."""

    def __init__(
        self,
        *,
        vocabulary: int,
        layers: int,
        width: int,
        context: int,
        heads: int = 4,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        if tied:
            self.head.weight = self.characters.weight

    def forward(self, characters: Tensor) -> Tensor:
        hidden = self.characters(characters) + self.positions.weight[: characters.shape[1]]
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


class Lstm(nn.Module):
    """One LSTM layer over character numbers."""

    def __init__(self, *, vocabulary: int, width: int = 192) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, 64)
        self.lstm = nn.LSTM(64, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.characters(characters))
        return cast("Tensor", self.head(hidden))


class SkipGram(nn.Module):
    """A two-tower recommender: which word follows soon after which, by embeddings alone."""

    def __init__(self, *, items: int, width: int = 64) -> None:
        super().__init__()
        self.given = nn.Embedding(items, width)
        self.wanted = nn.Linear(width, items)
        nn.init.normal_(self.given.weight, std=width**-0.5)

    def forward(self, items: Tensor) -> Tensor:
        return cast("Tensor", self.wanted(torch.relu(self.given(items))))

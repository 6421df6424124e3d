"""A model of a GPT's shapes and nothing else: gradients of these, drawn at random."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_LAYERS = 12
_ROWS_PER_WIDTH = 64
# of a model of width d: blocks of 12 d^2 and an embedding of 64 d rows
_NUMEL_PER_SQUARE = 12 * _LAYERS + _ROWS_PER_WIDTH


class GptShapes(nn.Module):
    """Parameters of the shapes of a GPT of 12 layers with about `numel` of them.

    Its loss has gradients that are normal, times a scale of each row's own, and others in each
    call; they take a fraction of the time that a GPT's own do. Raises ValueError for fewer than a
    thousand parameters.
    """

    def __init__(self, numel: int) -> None:
        super().__init__()
        if numel < 1000:
            raise ValueError(f"parameters={numel}: expected a thousand at least")
        width = max(1, round(math.sqrt(numel / _NUMEL_PER_SQUARE)))
        block = [(3 * width, width), (3 * width,), (width, width), (width,)]
        block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
        block += [(width,)] * 4
        shapes = [(_ROWS_PER_WIDTH * width, width), *block * _LAYERS]
        self.parameters_of = nn.ParameterList(torch.zeros(shape) for shape in shapes)
        self._scales = [torch.randn(shape[0]).exp() for shape in shapes]
        self._noise = torch.randn(2 * max(math.prod(shape) for shape in shapes))

    def forward(self) -> Tensor:
        """Return the loss of one batch."""
        total = torch.zeros(())
        for parameter, scale in zip(self.parameters_of, self._scales, strict=True):
            start = int(torch.randint(self._noise.numel() - parameter.numel(), ()))
            noise = self._noise[start : start + parameter.numel()].view(parameter.shape)
            rows = (parameter * noise).reshape(len(scale), -1).sum(dim=1)
            total = total + rows @ scale
        return total

"""A model's values in one flat vector for each dtype, and what is done to such vectors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from topq_dist.dtypes import FLOATS, bits_of, tensor_of
from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.protocol.errors import InvalidError


class FlatModel:
    """The values of a model, zero at first, in one flat CPU vector for each dtype.

    flats: 1-D, in the order of spec.vectors; the tensors are views into them.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.flats = [zeros(vector.numel, vector.dtype) for vector in spec.vectors]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, in the order of the spec, as views."""
        views: dict[str, Tensor] = {}
        for vector, flat in zip(self.spec.vectors, self.flats, strict=True):
            layout = vector.layout
            for name, shape, where in zip(
                layout.names, layout.shapes, layout.slices(), strict=True
            ):
                views[name] = flat[where].view(shape)
        return {tensor.name: views[tensor.name] for tensor in self.spec.tensors}

    def raw(self) -> list[memoryview]:
        """Return the bytes of each vector, little-endian: read-only views, not copies."""
        return [raw_view(flat) for flat in self.flats]

    def load_raw(self, buffers: Sequence[bytes | bytearray | memoryview]) -> None:
        """Take the values from bytes like those of `raw`.

        Raises InvalidError, leaving the values as they were, for another number of buffers or
        other lengths.
        """
        if len(buffers) != len(self.flats):
            raise InvalidError(f"{len(buffers)} raw vectors: expected {len(self.flats)}")
        arrays = [np.frombuffer(buffer, dtype=np.uint8) for buffer in buffers]
        for place, (array, vector) in enumerate(zip(arrays, self.spec.vectors, strict=True)):
            if array.size != vector.raw_bytes:
                raise InvalidError(
                    f"raw vector {place} has {array.size} bytes: expected {vector.raw_bytes}"
                )
        for array, flat in zip(arrays, self.flats, strict=True):
            bits_of(flat).view(np.uint8)[...] = array

    def copy_from(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Take the values of these tensors, from any device.

        Raises ModelDiffersError, leaving the values as they were, unless they make up this model.
        """
        pairs = [(name, tensor.detach()) for name, tensor in named]
        ModelSpec.of(pairs).check_same(self.spec)
        views = self.tensors()
        for name, tensor in pairs:
            views[name].copy_(tensor)

    def clone(self) -> FlatModel:
        """Return a model of the same values in memory of its own."""
        other = FlatModel(self.spec)
        other.load_raw(self.raw())
        return other


def zeros(numel: int, dtype: torch.dtype) -> Tensor:
    """Return `numel` zeros in memory that numpy allocates: it asks for huge pages, torch not."""
    return tensor_of(np.zeros(numel, FLOATS[dtype].key), dtype)


def copy_of(tensor: Tensor) -> Tensor:
    """Return a contiguous copy in memory like that of `zeros`: a third of the time of clone()."""
    if tensor.dtype not in FLOATS:
        return tensor.clone()
    return zeros(tensor.numel(), tensor.dtype).view(tensor.shape).copy_(tensor)


def magnitude(tensor: Tensor) -> float:
    """Return the largest absolute value of a CPU tensor of floats; infinity where one is NaN."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor.detach())
    largest = max(abs(float(low)), abs(float(high)))
    return math.inf if math.isnan(largest) else largest


def raw_view(flat: Tensor) -> memoryview:
    """Return the bytes of a contiguous 1-D CPU tensor as a read-only view."""
    if flat.numel() == 0:
        return memoryview(b"")
    return flat.detach().view(torch.uint8).numpy().data.toreadonly()


def picked(flat: Tensor, indices: Tensor) -> Tensor:
    """Return the elements of a flat CPU vector at int64 indices within it."""
    # by numpy, here and below: it takes half of torch's time and wakes no threads
    return tensor_of(bits_of(flat).take(indices.numpy(), mode="clip"), flat.dtype)


def put(flat: Tensor, indices: Tensor, values: Tensor) -> None:
    """Set the elements of a flat CPU vector at int64 indices to values of its dtype."""
    bits_of(flat)[indices.numpy()] = bits_of(values)


def put_zeros(flat: Tensor, indices: Tensor) -> None:
    """Set the elements of a flat CPU vector at int64 indices to zero."""
    bits_of(flat)[indices.numpy()] = 0

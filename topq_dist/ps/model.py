"""The model as the server sees it: named tensors laid out in one flat vector for each dtype."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor

from topq_dist.compress.blocks import bits_of, tensor_of
from topq_dist.compress.feedback import Layout
from topq_dist.compress.frame import max_frame_bytes
from topq_dist.compress.frame_header import LARGEST_NUMEL
from topq_dist.ps.protocol import InvalidError, ModelDiffersError

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_VALUE_FORMATS = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}
# numpy has no bf16, and of fp16 only the bytes are needed
_STORAGE = {2: np.int16, 4: np.int32, 8: np.int64}
_MOST_DIMENSIONS = 64


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, shape and dtype of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Elements of the tensor, as a Python int of any size."""
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class VectorSpec:
    """The tensors of one dtype, one behind the other."""

    dtype: torch.dtype
    layout: Layout

    @cached_property
    def numel(self) -> int:
        """Elements of the vector."""
        return self.layout.numel

    @property
    def numels(self) -> tuple[int, ...]:
        """Elements of each of its tensors."""
        return tuple(prod(shape) for shape in self.layout.shapes)

    @property
    def raw_bytes(self) -> int:
        """Bytes of its numbers as they are."""
        return self.numel * self.dtype.itemsize

    @property
    def value_format(self) -> str:
        """The frame's value format that holds this dtype as it is."""
        return _VALUE_FORMATS[self.dtype]

    @property
    def max_frame_bytes(self) -> int:
        """Length that no frame of the vector exceeds, in whatever value format."""
        # fp64 is the widest, but for a few values each in a segment of its own; no index coding is
        # longer than a bitmap
        longest = max(
            max_frame_bytes(self.numel, self.numel, value_format, segments=self.numel)
            for value_format in ("fp64", "int8")
        )
        return longest + -(-self.numel // 8)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The tensors of a model, in the order in which they were named.

    Raises InvalidError, naming the tensor, for no tensors, a name that is empty or comes twice, a
    shape or a dtype that no model has, or sizes past what a frame can hold.
    """

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        if not self.tensors:
            raise InvalidError("the model has no tensors: expected at least one")
        seen: set[str] = set()
        for tensor in self.tensors:
            _check_tensor(tensor)
            if tensor.name in seen:
                raise InvalidError(f"tensor {tensor.name!r} comes twice: expected distinct names")
            seen.add(tensor.name)
        for dtype in {tensor.dtype for tensor in self.tensors}:
            numel = sum(tensor.numel for tensor in self.tensors if tensor.dtype == dtype)
            if numel > LARGEST_NUMEL:
                raise InvalidError(f"{numel} elements of {dtype}: expected {LARGEST_NUMEL} at most")

    @staticmethod
    def of(named: Iterable[tuple[str, Tensor]]) -> ModelSpec:
        """Return the spec of these tensors."""
        return ModelSpec(
            tensors=tuple(
                TensorSpec(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype)
                for name, tensor in named
            )
        )

    @cached_property
    def vectors(self) -> tuple[VectorSpec, ...]:
        """One for each dtype, in the order in which the dtypes first occur."""
        members: dict[torch.dtype, list[TensorSpec]] = {}
        for tensor in self.tensors:
            members.setdefault(tensor.dtype, []).append(tensor)
        return tuple(
            VectorSpec(
                dtype=dtype,
                layout=Layout(
                    names=tuple(tensor.name for tensor in tensors),
                    shapes=tuple(tensor.shape for tensor in tensors),
                ),
            )
            for dtype, tensors in members.items()
        )

    @property
    def numel(self) -> int:
        """Elements of the model."""
        return sum(vector.numel for vector in self.vectors)

    @property
    def raw_bytes(self) -> int:
        """Bytes of the model's numbers as they are."""
        return sum(vector.raw_bytes for vector in self.vectors)

    @cached_property
    def max_frame_bytes(self) -> int:
        """Length that the frames of one step together do not exceed, in whatever value format."""
        return sum(vector.max_frame_bytes for vector in self.vectors)

    def check_same(self, run: ModelSpec) -> None:
        """Raise ModelDiffersError, naming the first difference, unless this model is the run's."""
        if self == run:
            return
        ours = {tensor.name: tensor for tensor in self.tensors}
        theirs = {tensor.name: tensor for tensor in run.tensors}
        for tensor in run.tensors:
            if tensor.name not in ours:
                raise ModelDiffersError(f"tensor {tensor.name!r} of the run is missing here")
        for mine in self.tensors:
            other = theirs.get(mine.name)
            if other is None:
                raise ModelDiffersError(f"tensor {mine.name!r} is here and not in the run")
            for what in ("shape", "dtype"):
                here, there = getattr(mine, what), getattr(other, what)
                if here != there:
                    raise ModelDiffersError(
                        f"tensor {mine.name!r} has {what} {here} here and {there} in the run"
                    )
        place, (mine, other) = next(
            (place, pair)
            for place, pair in enumerate(zip(self.tensors, run.tensors, strict=True))
            if pair[0] != pair[1]
        )
        raise ModelDiffersError(
            f"tensor {place + 1} is {mine.name!r} here and {other.name!r} in the run: expected "
            "the same order"
        )


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
            for name, shape, stretch in zip(
                layout.names, layout.shapes, layout.stretches(), strict=True
            ):
                views[name] = flat[stretch].view(shape)
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
    return torch.from_numpy(np.zeros(numel, dtype=_STORAGE[dtype.itemsize])).view(dtype)


def copy_of(tensor: Tensor) -> Tensor:
    """Return a contiguous copy in memory like that of `zeros`: a third of the time of clone()."""
    if tensor.dtype not in _VALUE_FORMATS:
        return tensor.clone()
    return zeros(tensor.numel(), tensor.dtype).view(tensor.shape).copy_(tensor)


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


def _check_tensor(tensor: TensorSpec) -> None:
    if not isinstance(tensor.name, str) or not tensor.name:
        raise InvalidError(f"a tensor is named {tensor.name!r}: expected a text that is not empty")
    if tensor.dtype not in _VALUE_FORMATS:
        known = ", ".join(DTYPES)
        raise InvalidError(
            f"tensor {tensor.name!r} has dtype {tensor.dtype}: expected one of {known}"
        )
    lengths_fit = all(
        isinstance(length, int) and not isinstance(length, bool) and 0 <= length <= LARGEST_NUMEL
        for length in tensor.shape
    )
    if not lengths_fit or len(tensor.shape) > _MOST_DIMENSIONS or tensor.numel > LARGEST_NUMEL:
        raise InvalidError(
            f"tensor {tensor.name!r} has shape {tensor.shape}: expected at most {_MOST_DIMENSIONS} "
            f"dimensions and {LARGEST_NUMEL} elements"
        )

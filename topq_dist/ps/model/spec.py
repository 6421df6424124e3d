"""The model as the server sees it: named tensors laid out in one flat vector for each dtype."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from topq_dist.compress.codec.frame import max_frame_bytes
from topq_dist.compress.codec.header import LARGEST_NUMEL
from topq_dist.compress.layout import Layout
from topq_dist.dtypes import FLOATS, Indices
from topq_dist.ps.protocol.errors import InvalidError, ModelDiffersError

# by their names on the wire and in snapshots
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")}
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
        return FLOATS[self.dtype].value_format

    @property
    def max_frame_bytes(self) -> int:
        """Length that no frame of a worker exceeds, in whatever value format."""
        # fp64 is the widest, but for a few values and for each in a segment of its own; no index
        # coding is longer than a bitmap, but tiles, in which no worker writes
        longest = max(
            max_frame_bytes(self.numel, self.numel, value_format, segments=self.numel)
            for value_format in ("fp64", "int8", "ec2", "ecfp16")
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

    @cached_property
    def places(self) -> tuple[Indices, ...]:
        """Of each vector, where its tensors stand among all, as int64."""
        return tuple(
            np.flatnonzero([tensor.dtype == vector.dtype for tensor in self.tensors])
            for vector in self.vectors
        )

    @property
    def numel(self) -> int:
        """Elements of the model."""
        return sum(vector.numel for vector in self.vectors)

    @cached_property
    def raw_bytes(self) -> int:
        """Bytes of the model's numbers as they are."""
        return sum(vector.raw_bytes for vector in self.vectors)

    @cached_property
    def max_frame_bytes(self) -> int:
        """Length that the frames of one step together do not exceed, in whatever value format."""
        return sum(vector.max_frame_bytes for vector in self.vectors)

    def no_gradient(self, absent: Sequence[bool]) -> bytes:
        """Return what a push says of tensors that its worker has no gradient of.

        absent: whether that is so, of each tensor in order. Nothing where it is so of none.
        """
        return np.packbits(absent, bitorder="little").tobytes() if any(absent) else b""

    def without_gradient(self, no_gradient: bytes) -> npt.NDArray[np.bool_]:
        """Return, of each tensor in order, whether `no_gradient` says that there is no gradient.

        Raises InvalidError for what no worker of this model would say.
        """
        count = len(self.tensors)
        if not no_gradient:
            return np.zeros(count, bool)
        bits = np.unpackbits(np.frombuffer(no_gradient, np.uint8), bitorder="little")
        if len(no_gradient) != -(-count // 8) or bits[count:].any() or not bits.any():
            raise InvalidError(
                f"no_gradient={no_gradient[:16].hex()}...: expected a bit for each of {count} "
                "tensors, or nothing"
            )
        return bits[:count].astype(bool)

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


def _check_tensor(tensor: TensorSpec) -> None:
    if not isinstance(tensor.name, str) or not tensor.name:
        raise InvalidError(f"a tensor is named {tensor.name!r}: expected a text that is not empty")
    if tensor.dtype not in FLOATS:
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

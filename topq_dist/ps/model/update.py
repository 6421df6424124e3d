"""Updates of a model: elements that changed, frames that set them, and how both sides apply one.

A worker and the server, to its copy of what workers hold, do the same here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from topq_dist.compress.codec.frame import FrameError, decode_frame, encode_frame
from topq_dist.compress.codec.values import quantize
from topq_dist.compress.kernels import find_differing
from topq_dist.dtypes import bits_of
from topq_dist.ps.model.flat import FlatModel, picked, put, raw_view
from topq_dist.ps.model.spec import ModelSpec, VectorSpec
from topq_dist.ps.protocol.errors import InvalidError
from topq_dist.ps.protocol.types import Update, UpdateKind

# beyond this share of changed elements a frame saves a fifth at most, and takes ten times as long
# to make
_MOST_CHANGED = 3 / 4
_SAMPLE_NUMEL = 32_768


class Change(NamedTuple):
    """Ascending int64 indices of a vector, and its values there, of the vector's dtype."""

    indices: Tensor
    values: Tensor


@dataclass(frozen=True, kw_only=True)
class SparseDelta:
    """The only elements of a vector that a step can have changed.

    indices: int64, ascending. before, after: their values, of the vector's dtype.
    """

    indices: Tensor
    before: Tensor
    after: Tensor

    def change(self) -> Change:
        """Return those of which a bit has changed."""
        room = np.empty(self.indices.numel(), dtype=np.int64)
        count = find_differing(bits_of(self.after), bits_of(self.before), room)
        if count == room.size:
            return Change(self.indices, self.after)
        places = torch.from_numpy(room[:count])
        return Change(
            torch.from_numpy(self.indices.numpy().take(room[:count])), picked(self.after, places)
        )


def changes_between(old: FlatModel, new: FlatModel) -> list[Change] | None:
    """Return what has other bits in `new`, by vector; None where frames of it would save little."""
    budget_bytes = int(_MOST_CHANGED * new.spec.raw_bytes)
    if _sampled_bytes(old, new) > budget_bytes:
        return None
    changes = []
    for old_flat, flat in zip(old.flats, new.flats, strict=True):
        bits = bits_of(flat)
        room = np.empty(min(flat.numel(), budget_bytes // bits.itemsize), dtype=np.int64)
        count = find_differing(bits, bits_of(old_flat), room)
        if count < 0:
            return None
        budget_bytes -= count * bits.itemsize
        indices = torch.from_numpy(room[:count].copy())
        changes.append(Change(indices, picked(flat, indices)))
    return changes


def set_frames(spec: ModelSpec, changes: Sequence[Change]) -> list[memoryview] | None:
    """Return the frames that set these elements; None where raw is smaller, or alone can do it."""
    if not all(bool(torch.isfinite(change.values).all()) for change in changes):
        return None
    frames = [
        _lossless_frame(vector, change)
        for vector, change in zip(spec.vectors, changes, strict=True)
    ]
    if sum(frame.numel() for frame in frames) > spec.raw_bytes:
        return None
    return [raw_view(frame) for frame in frames]


def _differ(now: Tensor, before: Tensor) -> Tensor:
    return torch.from_numpy(bits_of(now) != bits_of(before))


def _sampled_bytes(old: FlatModel, new: FlatModel) -> float:
    """Return about how many bytes differ, from a look at a few."""
    total = 0.0
    for old_flat, flat in zip(old.flats, new.flats, strict=True):
        # odd, or a power-of-two row length would show one column only
        stride = max(1, flat.numel() // _SAMPLE_NUMEL) | 1
        differing = bits_of(flat)[::stride] != bits_of(old_flat)[::stride]
        if differing.size:
            total += float(differing.mean()) * flat.numel() * flat.dtype.itemsize
    return total


def _lossless_frame(vector: VectorSpec, change: Change) -> Tensor:
    quantized = quantize(change.values, vector.value_format)
    if vector.dtype == torch.float16 and bool(
        _differ(quantized.decoded.half(), change.values).any()
    ):
        # scaled down beside very large values, the smallest lose a bit
        quantized = quantize(change.values, "fp32")
    return encode_frame(vector.numel, change.indices, quantized)


def apply_update(model: FlatModel, update: Update) -> list[Tensor] | None:
    """Change what a worker holds as `update` says; return where, for each vector, None: anywhere.

    Raises FrameError or InvalidError, leaving the model as it was, for payloads that are no update
    of it.
    """
    if update.kind is UpdateKind.FULL:
        model.load_raw(update.payloads)
        return None
    if len(update.payloads) != len(model.flats):
        raise InvalidError(f"{len(update.payloads)} payloads: expected {len(model.flats)}")
    frames = [
        decode_frame(payload, numel=flat.numel())
        for payload, flat in zip(update.payloads, model.flats, strict=True)
    ]
    if not all(frame.finite for frame in frames):
        raise FrameError("frame of NaN or infinity: expected finite numbers")
    for flat, frame in zip(model.flats, frames, strict=True):
        if update.kind is UpdateKind.SET:
            put(flat, frame.indices, frame.values.to(flat.dtype))
        else:
            put(flat, frame.indices, added(picked(flat, frame.indices), frame.values))
    return [frame.indices for frame in frames]


def added(held: Tensor, decoded: Tensor) -> Tensor:
    """Return what a worker holds after an ADD: server and worker must round alike."""
    return (held + decoded).to(held.dtype)

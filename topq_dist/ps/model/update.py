"""Updates of a model, applied alike by a worker and by the server to its copy of a worker's."""

from __future__ import annotations

from torch import Tensor

from topq_dist.compress.codec.frame import FrameError, decode_frame
from topq_dist.ps.model.flat import FlatModel, picked, put
from topq_dist.ps.protocol.errors import InvalidError
from topq_dist.ps.protocol.types import Update, UpdateKind


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

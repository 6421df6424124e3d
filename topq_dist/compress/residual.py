"""Residuals: what a step does not send is kept and added to the next gradient (error feedback).

Source: Karimireddy et al., "Error Feedback Fixes SignSGD" (ICML 2019), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from topq_dist.compress.codec.frame import Frame
from topq_dist.compress.kernels import update_residual_span
from topq_dist.compress.kernels.scratch import BLOCK_NUMEL, as_summand, blocks, spans
from topq_dist.compress.kernels.threads import run_all
from topq_dist.compress.layout import ChunkedVector, Layout
from topq_dist.compress.locks import ForkSafeLock
from topq_dist.compress.sparsify.magnitude import check_vectors
from topq_dist.dtypes import Floats, Indices, bits_of, zeros

# one for all, which can be pickled; names may come from several threads at once
_MAKING = ForkSafeLock()
_NOTHING = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class ResidualUpdate:
    """What a step does to the residual of `layout`, for `Residuals.apply` once it is sure to count.

    residual: as `Residuals.flat` has returned it; where another has taken its place since, what
        the step has left is forgotten with it.
    decay: what the residual is multiplied by before anything is added to it.
    gradient: what is added to the residual, which is then `rest` (of its dtype) at `indices`: what
        the frames of both have left. Still what it was when it was compressed.
    added: what is added besides.
    flushed: slices of which this share, in (0, 1], has been sent; where it is all of all of them,
        the residual is freed.
    """

    layout: Layout
    residual: Tensor
    decay: float = 1.0
    gradient: ChunkedVector | None = None
    indices: Tensor = _NOTHING
    rest: Tensor = _NOTHING
    added: Frame | None = None
    flushed: Sequence[slice] = ()
    flushed_share: float = 0.0


class Residuals:
    """The unsent part of each named gradient, held as one contiguous vector per layout.

    Keyed by NAME, because DDP rebuilds its buckets after the first backward: a new layout gathers
    its vector from wherever the same names lie, and the old vector is freed with its last name.
    """

    def __init__(self) -> None:
        self._by_name: dict[str, Tensor] = {}
        self._flat: dict[Layout, Tensor] = {}
        # as the vectors are: layouts are equal whatever theirs
        self._strides: dict[Layout, tuple[tuple[int, ...] | None, ...]] = {}

    def flat(self, layout: Layout, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the residual of `layout` as a 1-D tensor that stays its home until it changes.

        Names not seen before start at zero. Raises ValueError where a name is held in another
        shape.
        """
        flat = self._flat.get(layout)
        if (
            flat is not None
            and flat.dtype == dtype
            and flat.device == device
            and self._strides[layout] == layout.strides
        ):
            return flat
        with _MAKING:
            self._check_shapes(layout)
            flat = zeros(layout.numel, dtype, device)
            homes = dict(zip(layout.names, layout.tensors(flat), strict=True))
            for name, home in homes.items():
                if name in self._by_name:
                    home.copy_(self._by_name[name])
            self._dissolve(set(layout.names))
            self._by_name.update(homes)
            self._strides[layout] = layout.strides
            self._flat[layout] = flat
            return flat

    def home(self, layout: Layout) -> Tensor:
        """Return what `flat` last returned for `layout`."""
        return self._flat[layout]

    @property
    def is_empty(self) -> bool:
        """Whether there is none of any name."""
        return not self._by_name

    def holds(self, layout: Layout) -> bool:
        """Return whether there is a residual of a name of `layout`."""
        return any(name in self._by_name for name in layout.names)

    def apply(
        self, update: ResidualUpdate | None, *, replace_by: Sequence[Frame] | None = None
    ) -> None:
        """Carry out an update; with `replace_by` its gradient becomes the sum of those frames.

        None changes nothing. Raises what `update_residual` raises.
        """
        if update is None:
            return
        residual = update.residual
        if update.decay != 1.0:
            residual.mul_(update.decay)
        if update.gradient is not None:
            for where, chunk, mine in update.gradient.split(update.indices):
                places = update.indices[mine]
                places = places - where.start if where.start else places
                update_residual(
                    residual[where], chunk, places, update.rest[mine], replace_by=replace_by
                )
        if update.added is not None:
            update.added.add_to(residual)
        for where in update.flushed:
            residual[where].mul_(1.0 - update.flushed_share)
        if update.flushed_share == 1.0 and len(update.flushed) == len(update.layout.names):
            self.clear(update.layout)

    def multiply(self, names: Iterable[str], factor: float) -> None:
        """Multiply the residuals of these parameters, of those that have one."""
        held = [self._by_name[name] for name in names if name in self._by_name]
        if held:
            torch._foreach_mul_(held, factor)

    def copies(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return copies of the residuals of these parameters, of those that have one."""
        return {name: self._by_name[name].clone() for name in names if name in self._by_name}

    def add(self, tensors: Mapping[str, Tensor], factor: float) -> None:
        """Add `factor` times these tensors to the residuals of their names, which they have."""
        for name, tensor in tensors.items():
            self._by_name[name].add_(tensor, alpha=factor)

    def clear(self, layout: Layout) -> None:
        """Forget the residuals of the names of `layout`, and free them."""
        with _MAKING:
            self._dissolve(set(layout.names))
            for name in layout.names:
                self._by_name.pop(name, None)

    def _dissolve(self, moved: set[str]) -> None:
        for old in [known for known in self._flat if not moved.isdisjoint(known.names)]:
            del self._flat[old]
            for name in set(old.names) - moved:
                # a view would keep the whole old vector alive until this name has moved too
                self._by_name[name] = self._by_name[name].clone()

    def _check_shapes(self, layout: Layout) -> None:
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            held = self._by_name.get(name)
            if held is not None and tuple(held.shape) != tuple(shape):
                raise ValueError(
                    f"residual of {name!r} has shape {tuple(held.shape)}: "
                    f"expected {tuple(shape)}, the shape of its gradient"
                )

    def __getstate__(self) -> dict[str, dict[str, Tensor]]:
        # pickle would part the views from their vectors; loading makes new ones
        return {"_by_name": self.state_dict()}

    def __setstate__(self, state: dict[str, dict[str, Tensor]]) -> None:
        self._by_name, self._flat, self._strides = state["_by_name"], {}, {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of each residual by name, shaped as its gradient."""
        plain = torch.contiguous_format
        with _MAKING:
            homes = dict(self._by_name)
        # copied with the lock free, which others wait for: a name that moves meanwhile leaves its
        # old vector as it was
        return {name: held.clone(memory_format=plain) for name, held in homes.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace every residual by those of `state`; names it lacks start at zero again.

        Raises TypeError or ValueError, and changes nothing, for what `check_residual` refuses.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state is a {type(state).__name__}: expected residuals by name")
        for name, residual in state.items():
            check_residual(name, residual)
        # cloned, or two owners (and every slice of one saved storage) would share memory
        self._by_name = {name: residual.detach().clone() for name, residual in state.items()}
        self._flat = {}


def merged(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the sum of the states' tensors by name."""
    sums: dict[str, Tensor] = {}
    for state in states:
        for name, tensor in state.items():
            there = sums.get(name)
            sums[name] = tensor if there is None else there + tensor.to(there.device)
    return sums


def check_residual(name: str, residual: Tensor) -> None:
    """Raise TypeError or ValueError, naming it, for what can be no residual."""
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual of {name!r} is a {type(residual).__name__}: expected a tensor")
    dtypes = (torch.float32, torch.float64)
    if residual.dtype not in dtypes or residual.layout != torch.strided or residual.is_meta:
        raise TypeError(
            f"residual of {name!r} has dtype {residual.dtype}, layout {residual.layout} and device "
            f"{residual.device}: expected a dense fp32 or fp64 tensor with data"
        )
    if not bool(torch.isfinite(residual).all()):
        raise ValueError(f"residual of {name!r} holds NaN or infinity: expected finite numbers")


def update_residual(
    residual: Tensor,
    gradient: Tensor,
    indices: Tensor,
    rest: Tensor,
    *,
    replace_by: Sequence[Frame] | None = None,
) -> None:
    """residual += gradient, then residual[indices] = rest: what the receivers did not get.

    `residual` and `gradient` are those of the selection, `indices` (ascending) and `rest` on any
    device; `rest` is of the residual's dtype, the selected values less what they decode to. With
    `replace_by` the gradient becomes the sum of those frames: on the CPU only, all of one dtype.
    Raises ValueError, having changed nothing, for anything else, and where the first or the last
    index of any of them is out of range.
    """
    check_vectors(gradient, residual)
    if residual.device.type != "cpu":
        if replace_by is not None:
            raise ValueError(f"replace_by with a gradient on {gradient.device}: expected the CPU")
        residual += gradient
        residual.index_copy_(0, indices.to(residual.device), rest.to(residual.device))
        return
    _check_range(indices.numpy(), residual.numel())
    if replace_by is not None:
        kinds = {gradient.dtype, residual.dtype, *(frame.values.dtype for frame in replace_by)}
        if len(kinds) > 1:
            raise ValueError(f"replace_by with {kinds}: expected one dtype")
        for frame in replace_by:
            _check_range(frame.indices.numpy(), residual.numel())
    vectors = residual.detach(), gradient.detach(), indices.numpy(), rest.numpy(), replace_by
    run_all(
        [partial(_update_span, *vectors, *span) for span in spans(residual.numel(), BLOCK_NUMEL)]
    )


def _check_range(indices: Indices, numel: int) -> None:
    if indices.size and (indices[0] < 0 or indices[-1] >= numel):
        raise ValueError(f"indices from {indices[0]} to {indices[-1]}: expected [0, {numel})")


def _update_span(
    residual: Tensor,
    gradient: Tensor,
    indices: Indices,
    rest: Floats,
    replace_by: Sequence[Frame] | None,
    start: int,
    stop: int,
) -> None:
    numbers, bits = residual.numpy(), bits_of(gradient)
    same = gradient.dtype == residual.dtype
    terms = [frame.indices.numpy() for frame in replace_by or ()]
    summands = [frame.values.numpy() for frame in replace_by or ()]
    for at, end in blocks(start, stop, max(1, stop - start) if same else BLOCK_NUMEL):
        mine = slice(*np.searchsorted(indices, (at, end)))
        places = [np.searchsorted(one, (at, end)) for one in terms]
        next_term, ends = np.array(places, np.int64).reshape(-1, 2).T.copy()
        if not update_residual_span(
            numbers[at:end],
            as_summand(bits[at:end], gradient.dtype, residual.dtype),
            at,
            indices[mine],
            rest[mine],
            replace_by is not None,
            terms,
            summands,
            next_term,
            ends,
        ):
            raise ValueError("indices do not ascend: some of the residual is lost")

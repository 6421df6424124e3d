"""Error feedback: what a step does not send is kept and added to the next gradient.

Source: Karimireddy et al., "Error Feedback Fixes SignSGD" (ICML 2019), algorithm 2.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which named tensors, in which order, make up a flat vector."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def numel(self) -> int:
        """Elements in the flat vector."""
        return sum(prod(shape) for shape in self.shapes)

    def stretches(self) -> list[slice]:
        """Where in the flat vector each of the tensors lies."""
        edges = [0, *accumulate(prod(shape) for shape in self.shapes)]
        return [slice(start, stop) for start, stop in pairwise(edges)]


# one for all, which can be pickled; names may come from several threads at once
_MAKING = threading.Lock()


class Residuals:
    """The unsent part of each named gradient, held as one contiguous vector per layout.

    Keyed by NAME, because DDP rebuilds its buckets after the first backward: a new layout gathers
    its vector from wherever the same names lie, and the old vector is freed with its last name.
    """

    def __init__(self) -> None:
        self._by_name: dict[str, Tensor] = {}
        self._flat: dict[Layout, Tensor] = {}

    def flat(self, layout: Layout, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the residual of `layout` as a 1-D tensor that stays its home until it changes.

        Names not seen before start at zero. Raises ValueError where a name is held in another
        shape.
        """
        flat = self._flat.get(layout)
        if flat is not None and flat.dtype == dtype and flat.device == device:
            return flat
        with _MAKING:
            self._check_shapes(layout)
            flat = _zeros(layout.numel, dtype, device)
            homes: dict[str, Tensor] = {}
            start = 0
            for name, shape in zip(layout.names, layout.shapes, strict=True):
                home = flat[start : start + prod(shape)].view(shape)
                if name in self._by_name:
                    home.copy_(self._by_name[name])
                homes[name] = home
                start += prod(shape)
            self._dissolve(set(layout.names))
            self._by_name.update(homes)
            self._flat[layout] = flat
            return flat

    def home(self, layout: Layout) -> Tensor:
        """Return what `flat` last returned for `layout`."""
        return self._flat[layout]

    def holds(self, layout: Layout) -> bool:
        """Return whether anything is kept for a name of `layout`."""
        return any(name in self._by_name for name in layout.names)

    def drop(self, layout: Layout) -> None:
        """Forget what is kept for the names of `layout`, and free it."""
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
        self._by_name, self._flat = state["_by_name"], {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of each residual by name, shaped as its gradient."""
        with _MAKING:
            return {name: residual.clone() for name, residual in self._by_name.items()}

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


def _zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(numel, dtype=dtype, device=device)
    # numpy asks the system for huge pages, which torch does not
    return torch.from_numpy(np.zeros(numel, np.float64 if dtype == torch.float64 else np.float32))


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

"""SGD without momentum and weight decay, taken at the elements of the gradient that are not zero.

Without momentum is also where momentum.py takes it out for the step. Elsewhere such a step changes
nothing. At these elements it is the same operation as torch's, and its bits are the same: see
tests/ps/training/test_central.py and test_server_momentum.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from topq_dist.ps.model.flat import FlatModel, picked, put
from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.training.aggregate import GradientSum
from topq_dist.ps.training.changes import SparseDelta


class SparseStep:
    """Takes an inner optimizer's step at few elements where that is all it does."""

    def __init__(
        self, inner: torch.optim.Optimizer, names: Sequence[Sequence[str]], spec: ModelSpec
    ) -> None:
        self._inner = inner
        group_of = {name: place for place, group in enumerate(names) for name in group}
        self._runs = [
            _runs([group_of[name] for name in vector.layout.names], vector.numels)
            for vector in spec.vectors
        ]

    def take(self, params: FlatModel, gradient: GradientSum) -> list[SparseDelta] | None:
        """Step, and return what may have changed; None, and nothing done, where it is dense."""
        if type(self._inner) is not torch.optim.SGD or not all(
            map(_is_sparse, self._inner.param_groups)
        ):
            return None
        unions = gradient.touched()
        if unions is None:
            return None
        before = [picked(flat, at) for at, flat in zip(unions, params.flats, strict=True)]
        if any(flat.dtype.itemsize == 2 for flat in params.flats):
            # in half precision torch's kernels round by where in memory an element lies
            self._inner.step()
            after = [picked(flat, at) for at, flat in zip(unions, params.flats, strict=True)]
        else:
            after = [
                self._stepped(place, at, before[place], picked(slopes, at))
                for place, (at, slopes) in enumerate(zip(unions, gradient.model.flats, strict=True))
            ]
            for flat, at, values in zip(params.flats, unions, after, strict=True):
                put(flat, at, values)
        return [
            SparseDelta(indices=at, before=old, after=new)
            for at, old, new in zip(unions, before, after, strict=True)
        ]

    def _stepped(self, place: int, at: Tensor, before: Tensor, slopes: Tensor) -> Tensor:
        groups = self._inner.param_groups
        ends = torch.tensor([end for end, _ in self._runs[place]])
        stops = torch.searchsorted(at, ends).tolist()
        return torch.cat(
            [
                before[start:stop].add(slopes[start:stop], alpha=-groups[group]["lr"])
                for start, stop, (_, group) in zip(
                    [0, *stops], stops, self._runs[place], strict=False
                )
            ]
        )


def _is_sparse(group: dict[str, Any]) -> bool:
    # maximize turns -0.0 into 0.0 where the gradient is zero, and so does a negative lr
    return (
        not (group["momentum"] or group["weight_decay"] or group["maximize"]) and group["lr"] >= 0
    )


def _runs(groups: Sequence[int], numels: Sequence[int]) -> list[tuple[int, int]]:
    """Return (end, group) of each stretch of neighbouring tensors that share a group."""
    runs: list[tuple[int, int]] = []
    end = 0
    for group, numel in zip(groups, numels, strict=True):
        end += numel
        if runs and runs[-1][1] == group:
            runs.pop()
        runs.append((end, group))
    return runs

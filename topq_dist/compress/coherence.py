"""Coherence: whether a gradient points where the residual does, and the rate that follows from it.

What waits w steps arrives as a sum of w gradients. An optimizer that divides by the root of a
moving mean of squares, as Adam does, moves by sqrt(w) rates for such a sum, whatever it holds: as
far as in w steps of their own where the gradients are independent of each other, and sqrt(w) times
too little where they agree. For gradients that agree the residual is w / 2 of them on average, so
that sqrt(1 + 2 c) with c = <residual, gradient> / <gradient, gradient> is the missing factor, and 1
for gradients that do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from topq_dist.compress.layout import ChunkedVector, Layout

# of a longer tensor one block in so many says as much
_WHOLE_NUMEL = 1 << 14
_BLOCK_NUMEL = 64
_EVERY = 32
# more than batches differ by
_MOST_WEIGHT = 4.0
# batches differ, and the rate should not follow each of them
_MEMORY = 0.9
# in steps of a 64th, in which the order does not show that buckets and ranks are added up in
_FACTOR_STEPS = 64


class Coherence(NamedTuple):
    """The two sums of one vector, of several, or of several ranks.

    aligned: <residual, gradient>. energy: <gradient, gradient>.
    """

    aligned: float = 0.0
    energy: float = 0.0

    @property
    def finite(self) -> bool:
        """Whether both are finite."""
        return math.isfinite(self.aligned) and math.isfinite(self.energy)

    @property
    def size(self) -> float:
        """The weight that it has beside others, where all are added up."""
        return max(abs(self.aligned), self.energy)

    @property
    def of_size_one(self) -> Coherence:
        """The same direction in size 1; nothing stays nothing."""
        size = self.size
        return Coherence(self.aligned / size, self.energy / size) if size else self


NO_COHERENCE = Coherence()


def total(coherences: Iterable[Coherence]) -> Coherence:
    """Return the sums over all of these, added up in their order."""
    aligned = energy = 0.0
    for one in coherences:
        aligned += one.aligned
        energy += one.energy
    return Coherence(aligned, energy)


def bounded_total(coherences: Iterable[Coherence]) -> Coherence:
    """Return the sums over several workers, of which none weighs over four times the median one."""
    given = list(coherences)
    sizes = sorted(one.size for one in given if one.size > 0.0)
    limit = _MOST_WEIGHT * sizes[(len(sizes) - 1) // 2] if sizes else 0.0
    return total(
        Coherence(one.aligned * (limit / one.size), one.energy * (limit / one.size))
        if one.size > limit
        else one
        for one in given
    )


def measure_coherence(
    gradient: Tensor | ChunkedVector, residual: Tensor, layout: Layout
) -> Coherence:
    """Return the sums of a flat gradient and its residual, of a sample of each long tensor.

    Both are 1-D of layout.numel elements and on one device, of any float dtype. What is sampled of
    a tensor, and in fp64 nearly to the bit what it comes to, does not depend on its bucket.
    """
    of_gradient, of_residual = (
        torch.cat([part for part, _ in _looked_at(flat, layout)]).double()
        for flat in (gradient, residual)
    )
    sums = torch.stack([torch.dot(of_residual, of_gradient), torch.dot(of_gradient, of_gradient)])
    aligned, energy = sums.tolist()
    return Coherence(aligned, energy)


def measure_energies(
    gradient: Tensor | ChunkedVector, residual: Tensor, layout: Layout
) -> tuple[float, float]:
    """Return about <residual, residual> and <gradient, gradient>, of a sample of long tensors.

    As measure_coherence, but what is sampled counts for all that it stands for.
    """
    sums = []
    for flat in (residual, gradient):
        total_energy = torch.zeros((), dtype=torch.float64, device=residual.device)
        for part, stands_for in _looked_at(flat, layout):
            looked_at = part.double()
            total_energy += stands_for / max(1, part.numel()) * torch.dot(looked_at, looked_at)
        sums.append(total_energy)
    of_residual, of_gradient = torch.stack(sums).tolist()
    return of_residual, of_gradient


def _looked_at(flat: Tensor | ChunkedVector, layout: Layout) -> Iterator[tuple[Tensor, int]]:
    """Yield what is looked at of a vector, and how many elements each stands for."""
    for where, long in _spans(layout):
        if long:
            yield _sampled(flat[where]), where.stop - where.start
        elif isinstance(flat, Tensor):
            yield flat[where], where.stop - where.start
        else:
            yield from ((piece, piece.numel()) for piece in flat.pieces(where))


@lru_cache(maxsize=64)
def _spans(layout: Layout) -> list[tuple[slice, bool]]:
    """Return where the tensors lie, and whether as samples: what is taken whole as one slice."""
    found: list[tuple[slice, bool]] = []
    for where in layout.slices():
        whole = where.stop - where.start <= _WHOLE_NUMEL
        if whole and found and not found[-1][1]:
            where = slice(found.pop()[0].start, where.stop)
        found.append((where, not whole))
    return found


def _sampled(flat: Tensor) -> Tensor:
    blocks = flat.numel() // _BLOCK_NUMEL
    return flat[: blocks * _BLOCK_NUMEL].view(blocks, _BLOCK_NUMEL)[::_EVERY].reshape(-1)


class CoherenceMean:
    """A moving mean of the coherence of a run's steps, the same on ranks that see the same sums."""

    def __init__(self) -> None:
        self.sums = Coherence()

    def add(self, step: Coherence) -> None:
        """Take in the sums of one more step; such as are not finite say nothing."""
        if step.finite:
            self.sums = Coherence(
                _MEMORY * self.sums.aligned + (1.0 - _MEMORY) * step.aligned,
                _MEMORY * self.sums.energy + (1.0 - _MEMORY) * step.energy,
            )

    def rate_factor(self, sent_fraction: float) -> float:
        """Return by what to multiply the rate: from 1 to sqrt(1 / sent_fraction).

        That is as fast as gradients go that are sent whole, and all agree.
        """
        aligned, energy = self.sums
        if not (aligned > 0.0 and energy > 0.0 and 0.0 < sent_fraction < 1.0):
            return 1.0
        factor = math.sqrt(min(1.0 + 2.0 * aligned / energy, 1.0 / sent_fraction))
        return math.floor(factor * _FACTOR_STEPS) / _FACTOR_STEPS

    def state(self) -> list[float]:
        """Return what `load_state` takes."""
        return list(self.sums)

    def load_state(self, state: list[float]) -> None:
        """Go on from what `check_state` has let pass."""
        self.sums = Coherence(*state)

    @staticmethod
    def check_state(state: object) -> list[float]:
        """Return `state`, or raise ValueError unless it is what `state` returns."""
        if (
            not isinstance(state, list)
            or len(state) != 2
            or not all(isinstance(number, float) and math.isfinite(number) for number in state)
            or state[1] < 0.0
        ):
            raise ValueError(f"state has coherence={state!r}: expected two finite numbers")
        return state

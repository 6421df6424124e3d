"""A fragment: parameters that are exchanged together, and what a rank has of them between rounds.

A round, from the change that inner steps have made to parameters that have taken up the average:

    change  =  parameters - base           `begin`
    average of the ranks' changes          compress/ and exchange/
    outer   =  outer optimizer's step      `finish`
    parameters and base take it up         `finish`

What an inner step has done is counted in one change and no other, so that with error feedback
nothing is sent twice: `base` is what the parameters were when they last began to change, which with
Streaming DiLoCo's blending is not the outer parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from topq_dist.compress.layout import Layout, gather_tensors
from topq_dist.dtypes import zeros
from topq_dist.local.outer import OuterSgd


class Fragment:
    """The outer parameters of a fragment, (n,) in `layout`, of `dtype`, on its parameters' device.

    parameters: by name; dense, of any shape and float dtype no wider than `dtype`. blend: in
        [0, 1), how much of themselves parameters keep that have gone on while the exchange was
        under way, as in Streaming DiLoCo: blend * parameters + (1 - blend) * outer parameters; None
        keeps what these inner steps have changed, all of it and nothing else.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        outer_optimizer: OuterSgd,
        *,
        dtype: torch.dtype,
        blend: float | None = None,
    ) -> None:
        self._held = list(parameters.values())
        local = self._parameters()
        self.layout = Layout(
            names=tuple(parameters), shapes=tuple(tuple(one.shape) for one in local)
        )
        self.numels = tuple(one.numel() for one in local)
        self._outer_optimizer = outer_optimizer
        self._dtype = dtype
        # of the outer parameters' dtype, all of them
        self._is_plain = all(one.dtype == dtype for one in local)
        self._blend = blend
        self.outer = self.gather()
        self.velocity: Tensor | None = None
        self.base: Tensor | None = None

    def _parameters(self) -> list[Tensor]:
        # asked for anew: trainers exchange the memory behind a parameter
        return [local_part(parameter) for parameter in self._held]

    def gather(self, out: Tensor | None = None) -> Tensor:
        """Return a copy of the parameters as one vector, in `out` where that is given."""
        parameters = self._parameters()
        flat = zeros(self.layout.numel, self._dtype, parameters[0].device) if out is None else out
        if not gather_tensors(parameters, self.layout, flat):
            for place, parameter in zip(self.layout.tensors(flat), parameters, strict=True):
                place.copy_(parameter)
        return flat

    def scatter(self, flat: Tensor) -> None:
        """Write a vector into the parameters."""
        for place, parameter in zip(self.layout.tensors(flat), self._parameters(), strict=True):
            parameter.copy_(place)

    def change_of(self, parameters: Tensor, *, out: Tensor) -> Tensor:
        """Write the change of a vector of parameters since the last round into `out`; return it."""
        base = self._rounded(self.outer) if self.base is None else self.base
        return torch.sub(parameters, base, out=out)

    def can_average_parameters(self) -> bool:
        """Return whether the mean of the ranks' parameters is what the outer parameters become.

        It is the sum of outer parameters and mean change, which rounds otherwise.
        """
        return self._outer_optimizer.averages and self._blend is None

    def frozen(self) -> tuple[int, ...]:
        """Return the places of parameters that need no gradient by now, and have a momentum."""
        if not self._outer_optimizer.momentum:
            return ()
        return tuple(place for place, one in enumerate(self._held) if not one.requires_grad)

    def step_outer(self, mean: Tensor, *, of_parameters: bool, frozen: Sequence[int] = ()) -> None:
        """Step the outer parameters by the mean of the ranks' changes, or of their parameters.

        frozen: places of parameters that momentum does not move: they take up what others have
        changed before, and rest.
        """
        if of_parameters:
            self.outer.copy_(mean)
            return
        if not frozen:
            self.velocity = self._outer_optimizer.step(self.outer, mean, self.velocity)
            return
        if self.velocity is None:
            self.velocity = torch.zeros_like(mean)
        vectors = [self.layout.tensors(one) for one in (self.outer, mean, self.velocity)]
        plain = replace(self._outer_optimizer, momentum=0.0, nesterov=False)
        for place, (outer, change, velocity) in enumerate(zip(*vectors, strict=True)):
            optimizer = plain if place in frozen else self._outer_optimizer
            optimizer.step(outer, change, velocity)

    def take_up(self, launched: Tensor | None) -> None:
        """Have the parameters take up the outer ones.

        launched: what the parameters were when the round began, where inner steps have been taken
        since; it is used up.
        """
        if launched is None:
            self.base = None
            self.scatter(self.outer)
            return
        if self._blend is None and self._is_plain:
            for place, outer, parameter in zip(
                self.layout.tensors(launched),
                self.layout.tensors(self.outer),
                self._parameters(),
                strict=True,
            ):
                parameter.sub_(place).add_(outer)
            return
        now = self.gather()
        if self._blend is None:
            self.scatter(now.sub_(launched).add_(self.outer))
            return
        self.scatter(now.lerp_(self.outer, 1.0 - self._blend))
        base = torch.lerp(launched, self.outer, 1.0 - self._blend, out=self.base)
        self.base = self._rounded(base)

    def _rounded(self, flat: Tensor) -> Tensor:
        """Return what a vector is in the parameters' own dtypes, or it is taken for a change."""
        if self._is_plain:
            return flat
        rounded = flat.clone()
        for place, parameter in zip(self.layout.tensors(rounded), self._parameters(), strict=True):
            place.copy_(place.to(parameter.dtype))
        return rounded


def local_part(parameter: Tensor) -> Tensor:
    """Return what this rank holds of a parameter, sharing its memory: of a DTensor its shard."""
    plain = parameter.detach()
    return plain.to_local() if isinstance(plain, DTensor) else plain


def split_in_fragments(numels: Mapping[str, int], count: int) -> list[list[str]]:
    """Return names in `count` runs of their order, of about as many elements each.

    Raises ValueError where there are fewer names than that.
    """
    if count > len(numels):
        raise ValueError(
            f"fragments={count}: expected at most {len(numels)}, the number of parameters"
        )
    names, total = list(numels), sum(numels.values())
    runs: list[list[str]] = [[]]
    done = 0
    for place, name in enumerate(names):
        needed = count - len(runs)
        middle = done + numels[name] / 2
        ends = runs[-1] and middle > total * len(runs) / count
        if needed and (ends or len(names) - place <= needed) and runs[-1]:
            runs.append([])
        runs[-1].append(name)
        done += numels[name]
    return runs

"""The momentum of each gradient on its own rank, before the selection.

Source: Lin et al., "Deep Gradient Compression" (ICLR 2018), equations 4 to 6 and momentum factor
masking: what has been sent takes its velocity with it, which would be stale by its next turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from topq_dist.compress.layout import Layout
from topq_dist.compress.residual import Residuals
from topq_dist.dtypes import accumulate_dtype


@dataclass(frozen=True, kw_only=True)
class Decay:
    """How a gradient g goes into the velocity u of one name: u = momentum u + share g.

    first_share: of the first gradient, torch's SGD taking all of it. nesterov: what is sent is
    g + momentum u, not u.
    """

    momentum: float
    share: float = 1.0
    first_share: float = 1.0
    nesterov: bool = False


class Advanced(NamedTuple):
    """The velocity after a step that may still turn out void."""

    velocity: Tensor
    advanced: Tensor
    names: frozenset[str]


class Velocity:
    """The velocities by name, each one contiguous vector per layout, like the residuals."""

    def __init__(self) -> None:
        self._velocities = Residuals()
        # those with a first gradient behind them
        self._begun: frozenset[str] = frozenset()

    def advance(
        self, flat: Tensor, layout: Layout, decays: Sequence[Decay | None], *, skip_unused: bool
    ) -> Advanced:
        """Replace the gradients in `flat` by what is sent of them; the velocity stays as it is.

        flat: 1-D of any float dtype, laid out as `layout`, with one Decay a name; None leaves the
            gradient alone.
        skip_unused: a gradient that is all zero is that of a parameter out of use, whose velocity
            waits.
        """
        dtype = accumulate_dtype(flat.dtype)
        velocity = self._velocities.flat(layout, dtype=dtype, device=flat.device)
        advanced, names = torch.zeros_like(velocity), set(self._begun)
        for name, where, decay in zip(layout.names, layout.slices(), decays, strict=True):
            gradient, after = flat[where], advanced[where]
            if decay is None or (skip_unused and not bool(gradient.any())):
                after.copy_(velocity[where])
                continue
            # the operations of torch's SGD, in its order, so that one rank has its bits
            if name in self._begun:
                torch.mul(velocity[where], decay.momentum, out=after)
                after.add_(gradient, alpha=decay.share)
            else:
                after.copy_(gradient).mul_(decay.first_share)
            names.add(name)
            sent = gradient.add(after, alpha=decay.momentum) if decay.nesterov else after
            gradient.copy_(sent)
        return Advanced(velocity, advanced, frozenset(names & set(layout.names)))

    def commit(self, advanced: Advanced, sent: Tensor | None) -> None:
        """Make a step count; `sent` are the indices whose velocity went with them, None none."""
        advanced.velocity.copy_(advanced.advanced)
        if sent is not None:
            advanced.velocity.index_fill_(0, sent.to(advanced.velocity.device), 0.0)
        self._begun |= advanced.names

    def clear(self) -> None:
        """Forget all velocities, and free them."""
        self.load_state_dict({})

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the velocities by name."""
        held = self._velocities.state_dict()
        return {name: held[name] for name in held if name in self._begun}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace every velocity by those of `state`; names it lacks begin anew."""
        self._velocities.load_state_dict(state)
        self._begun = frozenset(state)

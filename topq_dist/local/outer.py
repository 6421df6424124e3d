"""The outer optimizer: what steps the outer parameters along the average change of the ranks.

Sources: Stich, "Local SGD Converges Fast and Communicates Little" (ICLR 2019), whose average is
rate 1 without momentum; Douillard et al., "DiLoCo" (2023): Nesterov momentum 0.9 at rate 0.7;
SparseLoCo (arXiv 2508.15706): rate 1 without momentum, for which error feedback stands in.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from topq_dist.validation import check_fraction, check_number


@dataclass(frozen=True, kw_only=True)
class OuterSgd:
    """SGD on the outer parameters, by the formulas of torch.optim.SGD with -change as gradient.

    lr: above zero. momentum: in [0, 1). nesterov: only with momentum. Raises TypeError or
    ValueError for others.
    """

    lr: float = 1.0
    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if check_number("outer_lr", self.lr) <= 0.0:
            raise ValueError(f"outer_lr={self.lr!r}: expected a number above zero")
        if check_fraction("outer_momentum", self.momentum) == 1.0:
            raise ValueError(f"outer_momentum={self.momentum!r}: expected a number in [0, 1)")
        if not isinstance(self.nesterov, bool):
            raise TypeError(f"nesterov={self.nesterov!r}: expected True or False")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov=True with outer_momentum=0.0: expected momentum above zero")

    @property
    def averages(self) -> bool:
        """Whether a step goes all the way to the average of the ranks, and no further."""
        return self.lr == 1.0 and self.momentum == 0.0

    def step(self, outer: Tensor, change: Tensor, velocity: Tensor | None) -> Tensor | None:
        """Step `outer` in place along `change`, both (n,); return the velocity, None without.

        velocity: as the last step returned it, updated in place; None before the first.
        """
        if not self.momentum:
            outer.add_(change, alpha=self.lr)
            return None
        if velocity is None:
            velocity = change.clone()
        else:
            velocity.mul_(self.momentum).add_(change)
        step = change.add(velocity, alpha=self.momentum) if self.nesterov else velocity
        outer.add_(step, alpha=self.lr)
        return velocity

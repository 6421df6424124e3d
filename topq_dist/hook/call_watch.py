"""A hook that is never called: said once, before a whole run has gone by without it."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from topq_dist.optim.momentum_rules import stepping

STEPS_WITHOUT = 5
# by optimizer: a hook that is registered anew, on a model that is wrapped anew, replaces the first
_watches: weakref.WeakKeyDictionary[Optimizer, CallWatch] = weakref.WeakKeyDictionary()


class CallWatch:
    """Warns once where an optimizer has taken STEPS_WITHOUT steps before the hook was called.

    optimizer: the one whose steps are counted; None counts none.
    """

    def __init__(self, optimizer: Optimizer | None) -> None:
        self._steps = 0
        self._handle: RemovableHandle | None = None
        if optimizer is None:
            return
        counted = stepping(optimizer)
        if counted in _watches:
            _watches[counted].close()
        _watches[counted] = self
        self._handle = counted.register_step_post_hook(self)

    def close(self) -> None:
        """Stop counting, since the hook was called; a second call does nothing.

        Not from a hook of the optimizer, which is going through them.
        """
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __call__(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count a step: what the optimizer calls after it."""
        self._steps += 1
        if self._handle is None or self._steps != STEPS_WITHOUT:
            return
        warnings.warn(
            f"{type(optimizer).__name__} has taken {STEPS_WITHOUT} steps, and the hook was not "
            "called: gradients are exchanged without it, or not at all. See that the model which "
            "is trained is the one that took the hook (a trainer may wrap it anew, or leave out "
            "its ddp_comm_hook=: topq_dist.integrations registers it), that this wrapper is what "
            "is called, not its .module, and not always under no_sync()",
            stacklevel=3,
        )

    def __reduce__(self) -> tuple[type, tuple[None]]:
        # in a copy of the optimizer, which has no hook
        return CallWatch, (None,)

"""The rest of a model, which no server holds: parameters that were frozen, and buffers.

Neither trains there, nor comes from there to a worker that joins; a warning names it, once.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

_log = logging.getLogger(__name__)
# of those that a warning names
_MOST_NAMED = 8


def module_of(named_parameters: Iterable[Any]) -> nn.Module | None:
    """Return the module whose named_parameters() this is, unless it has been begun; None: unknown.

    A list of them, or another generator, does not say of which module it is.
    """
    if not inspect.isgenerator(named_parameters):
        return None
    if named_parameters.gi_code is not nn.Module.named_parameters.__code__:
        return None
    module = inspect.getgeneratorlocals(named_parameters).get("self")
    return module if isinstance(module, nn.Module) else None


def warn_of_buffers(module: nn.Module | None) -> None:
    """Name the buffers of a module that training may change: they stay this worker's own."""
    if module is None:
        return
    names = [
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        for name, buffer in part.named_buffers(recurse=False)
        if buffer.is_floating_point() and name not in part._non_persistent_buffers_set
    ]
    if names:
        _log.warning(
            "buffers %s stay this worker's own: the servers hold parameters alone, so that other "
            "workers, and those that join later, have others. Before you evaluate or save the "
            "model, make BatchNorm's statistics anew with torch.optim.swa_utils.update_bn(loader, "
            "model), or load one worker's buffers everywhere",
            _listed(names),
        )


class FrozenParameters:
    """Parameters that needed no gradient when the optimizer was made: no server holds them."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self._left = dict(named)

    def warn_of_freed(self) -> None:
        """Name those that need a gradient by now, each once."""
        freed = [name for name, parameter in self._left.items() if parameter.requires_grad]
        for name in freed:
            del self._left[name]
        if freed:
            _log.warning(
                "parameters %s need a gradient now, and do not train: they were frozen when this "
                "optimizer was made, so that no server holds them. Make it while they need one and "
                "freeze them afterwards: a parameter without a gradient stays as it is",
                _listed(freed),
            )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(map(repr, names[:_MOST_NAMED])) + more

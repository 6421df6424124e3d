"""What trains beside the exchange: frozen, or not there, when the exchange was made."""

from __future__ import annotations

import logging

from torch.optim import Optimizer

from topq_dist.local.model import LocalModel

_log = logging.getLogger(__name__)
# of those that a warning names
_MOST_NAMED = 8


class LeftOut:
    """Parameters of a model or its optimizer that are never exchanged; each is named once."""

    def __init__(self, model: LocalModel, optimizer: Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._known = {id(one) for one in model.parameters.values()}

    def warn(self) -> None:
        """Name those that train by now, as no rank hears of what the others make of them."""
        found = {
            id(one): f"one of shape {tuple(one.shape)}"
            for group in self._optimizer.param_groups
            for one in group["params"]
            if one.requires_grad
        }
        found |= {id(one): name for name, one in self._model.trainable().items()}
        found = {key: name for key, name in found.items() if key not in self._known}
        if not found:
            return
        self._known |= set(found)
        more = len(found) - _MOST_NAMED
        _log.warning(
            "parameters %s train by now and are never exchanged, so that each rank has its own: "
            "they were frozen, or neither the model's nor the optimizer's, when LocalTopQ was "
            "made. Make it anew, or make it while they need a gradient and freeze them afterwards",
            ", ".join([*found.values()][:_MOST_NAMED]) + (f" and {more} more" if more > 0 else ""),
        )

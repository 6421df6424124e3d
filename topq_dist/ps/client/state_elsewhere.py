"""The `state` that torch sees of an optimizer whose state is at servers and in its state_dict."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NoReturn


class StateElsewhere(defaultdict[Any, Any]):
    """An empty dict, of which nobody may ask whether it is.

    torch.distributed.checkpoint does, and steps an optimizer without state at a rate of 0 on
    gradients of zeros to see what comes: here it would push a step to the servers. It would take
    each worker's own residuals for copies of one another as well, and save one of them.
    """

    def __init__(self) -> None:
        super().__init__(dict)

    def __bool__(self) -> NoReturn:
        raise RuntimeError(
            "ParameterServerOptimizer.state holds nothing: the optimizer's state is at the "
            "servers, and what this worker keeps is in optimizer.state_dict(). So "
            "torch.distributed.checkpoint's get_, set_ and flatten_optimizer_state_dict cannot "
            "take it: save optimizer.state_dict() with torch.save, a file for each worker, and "
            "give it back to optimizer.load_state_dict"
        )

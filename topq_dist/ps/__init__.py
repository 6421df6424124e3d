"""The parameter server: many workers push gradients, one inner optimizer steps in the middle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from topq_dist.ps.protocol.errors import RefusedError, ServerLostError

if TYPE_CHECKING:
    from topq_dist.ps.client.optimizer import ParameterServerOptimizer

__all__ = ["ParameterServerOptimizer", "RefusedError", "ServerLostError"]


def __getattr__(name: str) -> Any:
    # on demand: modules of this package that need neither torch nor grpc are imported through here
    if name == "ParameterServerOptimizer":
        from topq_dist.ps.client.optimizer import ParameterServerOptimizer

        return ParameterServerOptimizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The parameter server: many workers push gradients, one inner optimizer steps in the middle.

It needs the packages of the extra `ps`; whoever imports it without them is told so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from topq_dist.ps.protocol.errors import RefusedError, ServerLostError

if TYPE_CHECKING:
    from topq_dist.ps.client.optimizer import ParameterServerOptimizer

__all__ = ["ParameterServerOptimizer", "RefusedError", "ServerLostError"]

# what imports of the extra's packages begin with
_EXTRA = ("click", "google", "grpc", "grpc_health", "grpc_reflection", "safetensors")


def without_extra(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Return the error that says what to install, or `error` where it is of another package."""
    if (error.name or "").partition(".")[0] not in _EXTRA:
        return error
    return ModuleNotFoundError(
        f"the parameter server needs {error.name}, which is not installed: run pip install '.[ps]' "
        "in a clone of topq_dist, or pip install 'FILE[ps]' with the FILE of its wheel",
        name=error.name,
    )


def __getattr__(name: str) -> Any:
    # on demand: modules of this package that need neither torch nor grpc are imported through here
    if name == "ParameterServerOptimizer":
        try:
            from topq_dist.ps.client.optimizer import ParameterServerOptimizer
        except ModuleNotFoundError as error:
            raise without_extra(error) from error
        return ParameterServerOptimizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

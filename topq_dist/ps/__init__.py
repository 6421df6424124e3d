"""The parameter server: many workers push gradients, one inner optimizer steps in the middle.

It needs the packages of the extra `ps`; whoever imports it without them is told so.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from topq_dist.ps.protocol.errors import RefusedError, ServerLostError

if TYPE_CHECKING:
    from topq_dist.ps.client.optimizer import ParameterServerOptimizer
    from topq_dist.ps.security import ClientTls, read_token

__all__ = [
    "ClientTls",
    "ParameterServerOptimizer",
    "RefusedError",
    "ServerLostError",
    "read_token",
]

# on demand: modules of this package that need neither torch nor grpc are imported through here
_HOMES = {
    "ClientTls": "security",
    "ParameterServerOptimizer": "client.optimizer",
    "read_token": "security",
}

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
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        raise without_extra(error) from error

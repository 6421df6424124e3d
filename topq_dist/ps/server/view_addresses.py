"""The addresses at which one may look on: those of metrics and of the status page."""

from __future__ import annotations

import importlib.util
import re

from topq_dist.ps.protocol.config import ConfigError, ServingConfig
from topq_dist.ps.security.address import Address

_LOOPBACK = "127.0.0.1"


def view_address(name: str, text: str) -> Address:
    """Return what "HOST:PORT", ":PORT" or "PORT" says; raises ConfigError, naming the field."""
    host = _LOOPBACK + ":" if re.fullmatch(r":?[0-9]+", text) else ""
    try:
        address = Address.parse(host + text.removeprefix(":") if host else text)
    except ValueError:
        address = None
    if address is None or address.path:
        raise ConfigError(
            name, text, "expected HOST:PORT, [IPV6]:PORT or a PORT of loopback, from 0 to 65535"
        )
    return address


def check_views(serving: ServingConfig) -> None:
    """Raise ConfigError for an address that is none, or metrics without prometheus-client."""
    if serving.metrics is not None:
        view_address("metrics", serving.metrics)
        if importlib.util.find_spec("prometheus_client") is None:
            raise ConfigError(
                "metrics",
                serving.metrics,
                "expected the package prometheus-client beside it: pip install '.[metrics]'",
            )
    if serving.http is not None:
        view_address("http", serving.http)

"""Names of this machine that lead nowhere else."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Return whether nothing beyond this machine answers to `host`: other names than localhost
    count as not, wherever they lead today.
    """
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

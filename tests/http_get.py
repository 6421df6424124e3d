"""A GET over HTTP, for tests of what is served on loopback."""

from __future__ import annotations

import urllib.request


def got(url: str, **headers: str) -> str:
    """Return the text at a URL of loopback; raises OSError where there is none."""
    if not url.startswith("http://127.0.0.1:"):
        raise ValueError(f"url={url!r}: expected one of loopback")
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - checked above
    with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
        return str(answer.read().decode())

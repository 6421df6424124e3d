"""Addresses of several servers in one text: "HOST:[50051-50054]", "topq-[0-3].topq:50051"."""

from __future__ import annotations

import re
from collections.abc import Sequence

from topq_dist.ps.security.address import Address

# an IPv6 address has no hyphen
_RANGE = re.compile(r"\[([0-9]+)-([0-9]+)\]")
_MOST = 1024


def in_many(text: str) -> list[str]:
    """Return the addresses of a text, one of which may stand for several, in order.

    Addresses are parted by commas; of "[A-B]" in one each number from A to B is put in its place,
    with as many digits as A where that begins with 0. Raises ValueError for a range that is none.
    """
    if text.startswith("unix:"):
        return [text]
    return [one for part in text.split(",") for one in _of_range(part.strip(), text)]


def _of_range(part: str, text: str) -> list[str]:
    match = _RANGE.search(part)
    if match is None:
        return [part]
    first, last = int(match[1]), int(match[2])
    if not first <= last < first + _MOST:
        raise ValueError(
            f"address={text!r}: expected a range [A-B] of at most {_MOST} numbers, A first"
        )
    width = len(match[1]) if match[1].startswith("0") else 0
    before, after = part[: match.start()], part[match.end() :]
    return [f"{before}{number:0{width}}{after}" for number in range(first, last + 1)]


def next_addresses(text: str, count: int) -> list[str]:
    """Return so many addresses on the ports from that of `text` on, or all of them with port 0.

    Raises ValueError for a Unix socket, and where there are fewer ports.
    """
    first = Address.parse(text)
    if count > 1 and first.path:
        raise ValueError(f"address={text!r}: expected HOST:PORT for {count} servers")
    if first.port + count - 1 > 65535:
        raise ValueError(f"address={text!r}: expected {count} ports from there, up to 65535")
    step = 1 if first.port else 0
    return [str(first.with_port(first.port + step * place)) for place in range(count)]


def in_one_name(addresses: Sequence[str]) -> str:
    """Return the shortest text that `in_many` reads as these addresses."""
    first = Address.parse(addresses[0])
    if not first.path and list(addresses) == next_addresses(addresses[0], len(addresses)):
        last = first.port + len(addresses) - 1
        host = str(first).rpartition(":")[0]
        return f"{host}:[{first.port}-{last}]" if len(addresses) > 1 else addresses[0]
    return ",".join(addresses)

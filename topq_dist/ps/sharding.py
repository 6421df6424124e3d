"""Which server holds which parameter, where there are several servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def shard_by_size(sizes_bytes: Mapping[str, int], servers: Sequence[str]) -> dict[str, list[str]]:
    """Return the parameters of each server, by size, as even as whole parameters allow.

    sizes_bytes: bytes of each parameter by name. The result has every server, in the order of
    their addresses as text, each with its parameters in the order of `sizes_bytes`.

    The largest parameter first, each goes to the server that has the fewest bytes so far (Graham's
    longest processing time rule: no server holds more than 4/3 of the best split's largest).
    Equals go by name and address, so that only names, sizes and addresses count: workers that write
    the addresses alike agree, in whatever order they list servers and parameters.

    Raises ValueError for no server, one that comes twice, or fewer parameters than servers.
    """
    if not servers:
        raise ValueError("servers is empty: expected the address of one server at least")
    twice = sorted({server for server in servers if servers.count(server) > 1})
    if twice:
        raise ValueError(f"servers has {', '.join(twice)} twice: expected distinct servers")
    if len(sizes_bytes) < len(servers):
        raise ValueError(
            f"{len(sizes_bytes)} parameters for {len(servers)} servers: expected one parameter for "
            "each server at least"
        )
    held_bytes = dict.fromkeys(sorted(servers), 0)
    held: dict[str, set[str]] = {server: set() for server in held_bytes}
    for name in sorted(sizes_bytes, key=lambda name: (-sizes_bytes[name], name)):
        # empty ones first: a parameter of zero bytes makes no server less empty
        least = min(held_bytes, key=lambda server: (held_bytes[server], len(held[server])))
        held_bytes[least] += sizes_bytes[name]
        held[least].add(name)
    return {server: [name for name in sizes_bytes if name in held[server]] for server in held}

"""Parameters are split over servers by size, alike on every worker."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topq_dist.ps.client.shard import shard_by_size

SIZES = st.dictionaries(st.text(min_size=1, max_size=4), st.integers(0, 1000), min_size=4)
SERVERS = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=4, unique=True)


@given(SIZES, SERVERS, st.randoms())
def test_every_worker_splits_alike_whatever_the_order(sizes, servers, random):  # type: ignore[no-untyped-def]
    held = shard_by_size(sizes, servers)
    names, listed = list(sizes), list(servers)
    random.shuffle(names)
    random.shuffle(listed)
    again = shard_by_size({name: sizes[name] for name in names}, listed)
    assert {server: set(held[server]) for server in held} == {
        server: set(again[server]) for server in again
    }
    assert list(held) == list(again) == sorted(servers)


@given(SIZES, SERVERS)
def test_each_parameter_has_one_server_and_each_server_a_parameter(sizes, servers):  # type: ignore[no-untyped-def]
    held = shard_by_size(sizes, servers)
    assert sorted(name for names in held.values() for name in names) == sorted(sizes)
    order = list(sizes)
    for names in held.values():
        assert names
        assert names == sorted(names, key=order.index)


@given(SIZES, SERVERS)
def test_no_server_has_more_than_a_parameter_beyond_another(sizes, servers):  # type: ignore[no-untyped-def]
    held = shard_by_size(sizes, servers)
    totals = {server: sum(sizes[name] for name in held[server]) for server in held}
    for server, total in totals.items():
        assert total - min(sizes[name] for name in held[server]) <= min(totals.values())


def test_a_large_one_leaves_the_rest_to_the_other() -> None:
    sizes = {"small": 10, "large": 100, "middle": 60, "middle2": 50}
    assert shard_by_size(sizes, ["b:1", "a:1"]) == {
        "a:1": ["small", "large"],
        "b:1": ["middle", "middle2"],
    }


@pytest.mark.parametrize(
    ("sizes", "servers", "message"),
    [
        ({"w": 1}, [], "servers is empty"),
        ({"w": 1}, ["a:1", "b:1"], "1 parameters for 2 servers"),
        ({"w": 1, "b": 1}, ["a:1", "a:1"], "has a:1 twice"),
    ],
)
def test_what_cannot_be_split_is_refused(
    sizes: dict[str, int], servers: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        shard_by_size(sizes, servers)

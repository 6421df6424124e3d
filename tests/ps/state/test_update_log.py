"""The history answers with what leads from a worker's point on, or not at all."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from topq_dist.ps.protocol.types import START, ModelVersion, Update, UpdateKind
from topq_dist.ps.state.update_log import UpdateLog

ROOMY = 1 << 30
KINDS = st.lists(st.sampled_from(UpdateKind), max_size=12)


def point(version: int, branch: str = "") -> ModelVersion:
    if version == 0:
        return START
    return ModelVersion(
        version=version, chain=hashlib.sha256(f"{version}{branch}".encode()).digest()
    )


def update(version: int, kind: UpdateKind = UpdateKind.ADD, length: int = 5) -> Update:
    payloads = (memoryview(bytes([version % 256]) * length), memoryview(b""))
    return Update.made(kind, point(version), payloads)


def history(kinds: list[UpdateKind], max_bytes: int = ROOMY, length: int = 5) -> UpdateLog:
    made = UpdateLog(max_bytes)
    for version, kind in enumerate(kinds, start=1):
        made.add(update(version, kind, length), ("a", f"w{version}"))
    return made


def joined(state: tuple[list[memoryview], dict[str, object]]) -> memoryview:
    return memoryview(b"".join(state[0]))


def test_a_new_history_knows_the_start() -> None:
    empty = UpdateLog(ROOMY)
    assert empty.newest == START
    assert empty.oldest_version == 1
    assert empty.updates(START, 0) == ()
    assert empty.updates(START, 1) is None
    assert empty.at(0) is empty.at(1) is None


def test_updates_from_a_point_to_a_version() -> None:
    made = history([UpdateKind.ADD] * 4)
    assert made.newest == point(4)
    assert made.updates(point(1), 3) == (update(2), update(3))
    assert made.updates(START, 4) == tuple(map(update, (1, 2, 3, 4)))
    assert made.updates(point(4), 4) == made.updates(point(2), 2) == ()
    assert made.at(3) == (point(3), ("a", "w3"))


def test_no_updates_where_none_lead_there() -> None:
    made = history([UpdateKind.ADD] * 4)
    assert made.updates(point(2, "another branch"), 3) is None
    assert made.updates(ModelVersion(version=0, chain=point(1).chain), 3) is None
    assert made.updates(point(5), 5) is None
    assert made.updates(point(1), 5) is None
    assert made.updates(point(3), 2) is None


def test_a_whole_model_replaces_what_came_before() -> None:
    kinds = [UpdateKind.ADD, UpdateKind.FULL, UpdateKind.SET, UpdateKind.FULL, UpdateKind.ADD]
    made = history(kinds)
    assert made.updates(START, 5) == (update(4, UpdateKind.FULL), update(5))
    assert made.updates(START, 3) == (update(2, UpdateKind.FULL), update(3, UpdateKind.SET))
    assert made.updates(point(4), 5) == (update(5),)


def test_the_oldest_are_dropped_beyond_the_bytes() -> None:
    made = history([UpdateKind.ADD] * 9, max_bytes=500_000, length=100_000)
    assert made.held_bytes <= 500_000
    assert made.oldest_version == 6
    assert made.at(5) is None
    # the point before the oldest update is still a base, the one before it is not
    kept = made.updates(point(5), 9)
    assert kept is not None
    assert [one.point.version for one in kept] == [6, 7, 8, 9]
    assert made.updates(point(4), 9) is None
    assert made.updates(START, 9) is None


def test_tiny_updates_are_bounded_too() -> None:
    made = history([UpdateKind.ADD] * 300, max_bytes=100_000, length=0)
    assert 300 - made.oldest_version < 100
    assert made.held_bytes <= 100_000


def test_the_last_is_always_kept() -> None:
    made = history([UpdateKind.FULL] * 3, max_bytes=0, length=1000)
    assert made.oldest_version == 3
    assert made.updates(point(2), 3) == (update(3, UpdateKind.FULL, 1000),)


@pytest.mark.parametrize("version", [0, 2, 4])
def test_versions_follow_each_other(version: int) -> None:
    made = history([UpdateKind.ADD] * 2)
    with pytest.raises(ValueError, match="expected 3"):
        made.add(update(version), ())
    assert made.newest == point(2)


def test_state_shares_the_payloads() -> None:
    made = history([UpdateKind.ADD])
    payload = memoryview(b"payload")
    made.add(Update(kind=UpdateKind.SET, point=point(2), payloads=(payload,)), ())
    assert made.state()[0][-1] is payload


@given(KINDS, st.integers(0, 40_000), st.integers(0, 40_000))
def test_state_round_trips(kinds: list[UpdateKind], max_bytes: int, other: int) -> None:
    made = history(kinds, max_bytes, length=3000)
    state = made.state()
    loaded = UpdateLog(max_bytes)
    loaded.load_state(joined(state), json.loads(json.dumps(state[1])))
    assert (loaded.newest, loaded.oldest_version) == (made.newest, made.oldest_version)
    assert (loaded.held_bytes, loaded.state()) == (made.held_bytes, state)
    for base in range(len(kinds) + 1):
        assert loaded.updates(point(base), len(kinds)) == made.updates(point(base), len(kinds))
    # with another bound it is as if it had been that bound from the start, but no longer
    smaller = UpdateLog(min(other, max_bytes))
    smaller.load_state(joined(state), state[1])
    assert smaller.state() == history(kinds, min(other, max_bytes), length=3000).state()
    if kinds:
        loaded.add(update(len(kinds) + 1), ("a",))


@given(KINDS, st.integers(0, 20_000))
def test_a_state_of_the_latest_is_that_of_a_smaller_history(
    kinds: list[UpdateKind], max_bytes: int
) -> None:
    whole = history(kinds, length=3000)
    assert whole.state(max_bytes) == history(kinds, max_bytes, length=3000).state()
    assert whole.oldest_version == 1


def test_loaded_payloads_do_not_hold_the_snapshot() -> None:
    state = history([UpdateKind.ADD] * 2).state()
    buffer = bytearray(joined(state))
    loaded = UpdateLog(ROOMY)
    loaded.load_state(memoryview(buffer), state[1])
    buffer.clear()  # raises BufferError where anything still looks into it
    assert loaded.updates(START, 2) == (update(1), update(2))


@pytest.mark.parametrize(
    "change",
    [
        "payloads cut",
        "payloads longer",
        "version",
        "chain",
        "kind",
        "length",
        "negative",
        "members",
        "before",
        "rows",
    ],
)
def test_a_state_that_no_history_returned(change: str) -> None:
    state = history([UpdateKind.ADD] * 2).state()
    payloads, metadata = joined(state), state[1]
    row = metadata["versions"][0]
    if change == "payloads cut":
        payloads = payloads[:-1]
    elif change == "payloads longer":
        payloads = memoryview(bytes(payloads) + b"x")
    elif change == "version":
        metadata["before"]["version"] = "0"
    elif change == "chain":
        row["chain"] = "00"
    elif change == "kind":
        row["kind"] = "HALF"
    elif change == "length":
        row["payload_bytes"] = [2**40]
    elif change == "negative":
        row["payload_bytes"] = [5, -5]
    elif change == "members":
        row["members"] = 3
    elif change == "before":
        del metadata["before"]
    else:
        metadata["versions"] = 5
    loaded = history([UpdateKind.ADD])
    before = loaded.state()
    with pytest.raises(ValueError, match="not a history"):
        loaded.load_state(payloads, metadata)
    assert loaded.state() == before

"""The ledger's verdicts, epochs and JSON, one by one."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from ps.ledger_calls import check, digest, push, reloaded

from topq_dist.ps.protocol.errors import (
    DigestDiffersError,
    ExpiredError,
    FencedError,
    InvalidError,
    NotJoinedError,
    SequenceGapError,
)
from topq_dist.ps.protocol.types import Push
from topq_dist.ps.state.ledger import Entry, Ledger, Next, Repeat

A, B, C = (bytes([letter]) * 16 for letter in b"ABC")


def of_two_versions() -> Ledger:
    ledger = Ledger()
    ledger.join("a", A, 0, 0)
    ledger.join("b", B, 0, 0)
    ledger.record(1, [push("a", 1, 1), push("b", 1, 1)])
    ledger.record(2, [push("a", 1, 2)])
    return ledger


def test_a_new_worker_starts_at_one() -> None:
    ledger = Ledger()
    assert ledger.join("a", A, 0, 0) == Entry(worker="a", instance=A, epoch=1, next_sequence=1)
    assert ledger.next_sequence("a") == 1
    assert ledger.workers == ("a",)


def test_joining_again_is_the_same_place() -> None:
    ledger = of_two_versions()
    place = ledger.entry("a")
    assert ledger.join("a", A, 0, 0) == ledger.join("a", A, 1, 7) == place


def test_a_newer_process_fences_the_older_off() -> None:
    ledger = of_two_versions()
    assert ledger.join("a", B, 0, 0) == Entry(worker="a", instance=B, epoch=2, next_sequence=3)
    with pytest.raises(FencedError, match=r"'a' in epoch 1: .* epoch 2"):
        check(ledger, push("a", 1, 3))
    with pytest.raises(FencedError):
        check(ledger, push("a", 1, 2))  # not even a repeat: its answer is of no use to anybody
    with pytest.raises(FencedError):
        ledger.join("a", A, 1, 3)
    assert check(ledger, push("a", 2, 2)) == Repeat(2)
    assert check(ledger, push("a", 2, 3)) == Next()


def test_of_two_processes_in_one_epoch_the_one_in_the_ledger_has_the_name() -> None:
    # a server restored from before B joined as epoch 2 gave that epoch to C
    ledger = of_two_versions()
    ledger.join("a", C, 0, 0)
    with pytest.raises(FencedError):
        ledger.join("a", B, 2, 3)


def test_a_ledger_from_before_a_worker_joined_takes_its_epoch_and_number() -> None:
    ledger = of_two_versions()
    assert ledger.join("a", B, 4, 9) == Entry(worker="a", instance=B, epoch=4, next_sequence=3)
    entry = Entry(worker="c", instance=C, epoch=3, next_sequence=5, first_sequence=5)
    assert ledger.join("c", C, 3, 5) == entry


def test_an_epoch_never_given_must_join_again() -> None:
    with pytest.raises(NotJoinedError, match="join again"):
        check(of_two_versions(), push("a", 2, 3))
    with pytest.raises(NotJoinedError, match="join first"):
        check(of_two_versions(), push("c", 1, 1))


def test_verdicts() -> None:
    ledger = of_two_versions()
    assert check(ledger, push("a", 1, 3)) == Next()
    assert check(ledger, push("a", 1, 2)) == Repeat(2)
    assert check(ledger, push("a", 1, 1)) == check(ledger, push("b", 1, 1)) == Repeat(1)
    with pytest.raises(SequenceGapError, match="sent push 4: expected push 3"):
        check(ledger, push("a", 1, 4))
    with pytest.raises(DigestDiffersError, match="version 2"):
        check(ledger, push("a", 1, 2, "other contents"))


def test_what_is_forgotten_is_not_applied_again() -> None:
    ledger = of_two_versions()
    ledger.forget_before(2)
    with pytest.raises(ExpiredError, match="from 2 on"):
        check(ledger, push("a", 1, 1))
    assert check(ledger, push("a", 1, 2)) == Repeat(2)
    with pytest.raises(ExpiredError):
        check(ledger, push("b", 1, 1))
    assert check(ledger, push("b", 1, 2)) == Next()


@pytest.mark.parametrize(
    ("version", "pushes"),
    [
        (2, [push("a", 1, 3)]),
        (4, [push("a", 1, 3)]),
        (3, []),
        (3, [push("b", 1, 2), push("a", 1, 2)]),
        (3, [push("b", 1, 2), push("a", 1, 4)]),
        (3, [push("b", 1, 2), push("a", 2, 3)]),
        (3, [push("b", 1, 2), push("c", 1, 1)]),
        (3, [push("b", 1, 2), push("b", 1, 2)]),
    ],
)
def test_a_wrong_record_changes_nothing(version: int, pushes: list[Push]) -> None:
    ledger = of_two_versions()
    before = ledger.to_json()
    with pytest.raises(ValueError, match="expected"):
        ledger.record(version, pushes)
    assert ledger.to_json() == before


def test_what_no_worker_would_send_is_invalid_and_changes_nothing() -> None:
    ledger = of_two_versions()
    before = ledger.to_json()
    for worker, instance, epoch, number in [
        ("a/b", A, 0, 0),
        ("", A, 0, 0),
        ("d", A[:15], 0, 0),
        ("d", A, -1, 0),
        ("d", A, 0, -1),
        ("d", A, 2**64, 0),
        ("d", A, 0, 2**64),
    ]:
        with pytest.raises(InvalidError):
            ledger.join(worker, instance, epoch, number)
    for sequence, contents in [(0, digest("")), (-1, digest("")), (3, b""), (2**64, digest(""))]:
        with pytest.raises(InvalidError):
            ledger.check("a", 1, sequence, contents)
    assert ledger.to_json() == before


def test_the_largest_claims_of_a_worker_still_load() -> None:
    ledger = Ledger()
    ledger.join("a", A, 2**62, 2**62)
    ledger.join("a", B, 0, 0)
    ledger.record(1, [push("a", 2**62 + 1, 2**62)])
    assert reloaded(ledger).to_json() == ledger.to_json()


def test_json_shares_nothing() -> None:
    ledger = of_two_versions()
    tree = ledger.to_json()
    written = json.dumps(tree)
    ledger.record(3, [push("a", 1, 3)])
    assert json.dumps(tree) == written
    restored = Ledger.from_json(tree)
    restored.record(3, [push("b", 1, 2)])
    assert json.dumps(tree) == written


def altered(path: list[str], value: object) -> dict[str, Any]:
    tree = of_two_versions().to_json()
    place: Any = tree
    for step in path[:-1]:
        place = place[step]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["version"], None),
        (["version"], -1),
        (["version"], 1),
        (["version"], "2"),
        (["workers"], []),
        (["workers", "a"], 7),
        (["workers", "a/b"], {}),
        (["workers", "a", "epoch"], 0),
        (["workers", "a", "epoch"], True),
        (["workers", "a", "next_sequence"], 2),
        (["workers", "a", "next_sequence"], 3.0),
        (["workers", "a", "instance"], "00"),
        (["workers", "a", "instance"], "zz"),
        (["workers", "a", "applied"], None),
        (["workers", "a", "applied"], "00"),
        (["workers", "a", "applied"], (struct.pack("<Q", 2) + digest("x")).hex() * 2),
    ],
)
def test_json_that_no_ledger_wrote(path: list[str], value: object) -> None:
    with pytest.raises(ValueError, match="not a ledger"):
        Ledger.from_json(altered(path, value))

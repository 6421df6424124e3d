"""The rules of sync mode where those who are there are not those who were expected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from topq_dist.ps.protocol.types import START, ModelVersion, Push
from topq_dist.ps.server.rounds import UNBELIEVED, Apply, Refuse, RoundView, SyncPolicy, Wait

PRESENT = ModelVersion(version=5, chain=bytes([5]) * 32)
AHEAD = ModelVersion(version=2**63, chain=bytes([9]) * 32)


def push(worker: str, base: ModelVersion = PRESENT, *beside: str) -> Push:
    return Push(
        worker=worker,
        epoch=1,
        sequence=1,
        base=base,
        frames=(),
        lr=(),
        digest=bytes(32),
        applied_version=base.version + 1 if beside else 0,
        members=(worker, *beside) if beside else (),
    )


def view(
    pending: Mapping[str, Push], live: str, point: ModelVersion = PRESENT, **changes: Any
) -> RoundView:
    options: dict[str, Any] = {
        "believed_version": AHEAD.version,
        "held_by": lambda worker: AHEAD.version,
        **changes,
    }
    return RoundView(
        point=point,
        pending=pending,
        live=frozenset(live),
        returning=options.pop("returning", frozenset()),
        joined=3,
        on_chain=lambda point: point == PRESENT,
        waiting_since_s=0.0,
        now_s=options.pop("now_s", 1.0),
        **options,
    )


def decide(
    pushes: list[Push], live: str, *, min_workers: int = 2, **changes: Any
) -> Apply | Refuse | Wait:
    rule = SyncPolicy(start_workers=1, min_workers=min_workers, round_timeout_s=10.0)
    return rule.decide(view({push.worker: push for push in pushes}, live, **changes))


def test_who_is_ahead_is_sent_back_where_too_few_are_left_without() -> None:
    assert decide([push("a"), push("b", AHEAD)], "abc") == Wait(("c",))
    assert decide([push("a"), push("b", AHEAD)], "ab") == Refuse(("b",))
    assert decide([push("a"), push("c"), push("b", AHEAD)], "abc") == Apply(("a", "c"))


def test_a_replay_whose_company_is_gone_is_joined_by_who_is_there() -> None:
    replay = push("a", PRESENT, "b")
    assert decide([replay], "abc") == Wait(("b",))
    assert decide([replay], "ac") == Wait(("c",))
    assert decide([replay, push("c")], "ac") == Apply(("a", "c"))
    assert decide([replay, push("d", AHEAD)], "ad") == Refuse(("d",))
    assert decide([replay], "a") == Wait(())


def test_a_round_has_a_size_before_it_is_whole() -> None:
    rule = SyncPolicy(start_workers=4, min_workers=2, round_timeout_s=None)
    a = {"a": push("a")}
    assert rule.size(view(a, "abc")) == 3
    assert rule.size(view(a, "bc")) == 3  # its lease is over, its push is there
    assert rule.size(view(a, "a")) == 2
    assert rule.size(view({"a": push("a", PRESENT, "b", "c")}, "ab")) == 3
    assert rule.size(view({}, "abc", START)) == 4
    few = SyncPolicy(start_workers=3, min_workers=1, round_timeout_s=None)
    assert few.size(view({}, "a", START)) == 1  # the others have joined, and gone


def alone(worker: str) -> Push:
    return replace(push(worker), applied_version=6, members=(worker,))


class TestWhoseReplaysAreBelieved:
    def decide(self, pushes: list[Push], live: str = "abm", **changes: Any) -> object:
        return decide(pushes, live, min_workers=1, **changes)

    def test_nobodys_once_the_way_back_is_over(self) -> None:
        for lie in (alone("m"), push("m", AHEAD), replace(push("m"), applied_version=99)):
            found = self.decide([push("a"), lie], believed_version=0)
            assert found == Refuse(("m",), UNBELIEVED)

    def test_only_of_what_it_said_that_it_holds(self) -> None:
        found = self.decide([alone("m")], held_by=lambda worker: 5)
        assert found == Refuse(("m",), UNBELIEVED)

    def test_only_of_versions_that_somebody_was_in(self) -> None:
        held = {"a": 5, "b": 5, "m": 5}
        assert self.decide([alone("m")], believed_version=5, held=held) == Refuse(
            ("m",), UNBELIEVED
        )
        assert self.decide([alone("m")], believed_version=6, held=held) == Apply(("m",))

    def test_after_all_who_come_back_have_come(self) -> None:
        found = self.decide([alone("m")], returning=frozenset("ab"), held={"m": 9})
        assert found == Wait(("a", "b"))

    def test_not_one_who_leaves_out_whom_another_names_or_who_was_there(self) -> None:
        everybody = push("a", PRESENT, "b", "m")
        held = {"a": 9, "b": 9, "m": 9}
        assert self.decide([alone("m")], held=held) == Wait(("a", "b"))
        assert self.decide([alone("m"), everybody], held=held) == Wait(("b",))
        honest = [everybody, push("b", PRESENT, "a", "m")]
        assert self.decide([alone("m"), *honest], held=held) == Refuse(("m",), UNBELIEVED)
        assert self.decide([push("m"), *honest], held=held) == Apply(("a", "b", "m"))

    def test_not_one_alone_who_is_far_ahead_of_others_that_came_back(self) -> None:
        others = [push("a"), push("b")]
        held = {"a": 4, "b": 4, "m": 9}
        assert self.decide([alone("m"), *others], held=held) == Refuse(("m",), UNBELIEVED)
        # two who agree were there without the third
        agreed = [push("a", PRESENT, "m"), push("m", PRESENT, "a"), push("b")]
        assert self.decide(agreed, held=held) == Apply(("a", "m"))
        # nor one whom the snapshot does not know
        held = {"a": 5, "b": 5}
        assert self.decide([alone("m"), *others], held=held) == Refuse(("m",), UNBELIEVED)

    def test_who_is_silent_has_a_rounds_time_and_is_passed_over_then(self) -> None:
        replay = push("a", PRESENT, "b")
        assert self.decide([replay], held={"a": 6}, now_s=9.0) == Wait(("b",))
        assert self.decide([replay], held={"a": 6}, now_s=10.0) == Apply(("a",), ("b",))


def test_a_round_that_has_had_its_time_says_who_missed_it() -> None:
    assert decide([push("a"), push("b")], "abcd") == Wait(("c", "d"))
    assert decide([push("a"), push("b")], "abcd", now_s=10.0) == Apply(("a", "b"), ("c", "d"))

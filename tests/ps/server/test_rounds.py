"""The rules of sync mode where those who are there are not those who were expected."""

from __future__ import annotations

from collections.abc import Mapping

from topq_dist.ps.protocol.types import START, ModelVersion, Push
from topq_dist.ps.server.rounds import Apply, Refuse, RoundView, SyncPolicy, Wait

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


def view(pending: Mapping[str, Push], live: str, point: ModelVersion = PRESENT) -> RoundView:
    return RoundView(
        point=point,
        pending=pending,
        live=frozenset(live),
        returning=frozenset(),
        joined=3,
        on_chain=lambda point: point == PRESENT,
        waiting_since_s=0.0,
        now_s=1.0,
    )


def decide(pushes: list[Push], live: str) -> Apply | Refuse | Wait:
    rule = SyncPolicy(start_workers=1, min_workers=2, round_timeout_s=None)
    return rule.decide(view({push.worker: push for push in pushes}, live))


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

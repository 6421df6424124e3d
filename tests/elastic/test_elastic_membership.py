"""Members of an elastic run, each in a thread of its own: who is in, what counts, what ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from forked import FORKED

from topq_dist import Elastic, RefusedError
from topq_dist.elastic.errors import MemberLostError
from topq_dist.elastic.group import WatchedGroup
from topq_dist.elastic.membership import Epoch, Membership
from topq_dist.elastic.store import serve

T = TypeVar("T")


class Run:
    """Members of one run, closed with it."""

    def __init__(self) -> None:
        self.store = serve("127.0.0.1:0")
        self.members: list[Membership] = []
        self.pool = ThreadPoolExecutor(8)

    def member(self, name: str, *, settings: str = "q=0.9", **options: Any) -> Membership:
        usual: dict[str, Any] = {
            "store": f"127.0.0.1:{self.store.port}",
            "ranks": 2,
            "lease_s": 8.0,
        }
        elastic = Elastic(name=name, **(usual | options))
        per_node = 2 if settings == "in nodes" else 1
        made = Membership(elastic, settings=settings, per_node=per_node)
        self.members.append(made)
        return made

    def start(self, action: Callable[[], T]) -> Future[T]:
        return self.pool.submit(action)

    def together(self, *actions: Callable[[], T]) -> list[T]:
        return [one.result(30) for one in [self.start(action) for action in actions]]

    def begun(self, *members: Membership) -> list[Epoch]:
        """Have members enter an epoch, and say that they have the run's state."""
        epochs = self.together(*(member.next_epoch for member in members))
        self.together(*(member.decide for member in members))
        return epochs


@pytest.fixture
def run() -> Iterator[Run]:
    run = Run()
    yield run
    for member in run.members:
        member.close()
    run.pool.shutdown()


def test_ranks_are_by_name_and_a_newcomer_ends_the_epoch_after_a_round_that_counts(
    run: Run,
) -> None:
    ten, two = run.member("10"), run.member("2")
    first = run.begun(ten, two)
    assert [epoch.rank for epoch in first] == [1, 0]
    assert [member.name for member in first[0].members] == ["2", "10"]
    assert first[0].source == 0
    newcomer = run.member("1")
    coming = run.start(newcomer.next_epoch)
    while not any(run.together(ten.decide, two.decide)):
        pass
    second = run.together(ten.next_epoch, two.next_epoch)
    assert coming.result(30).rank == 0
    assert [member.name for member in second[0].members] == ["1", "2", "10"]
    assert second[0].source == 1
    assert second[0].lost == ()
    assert not newcomer.has_state
    run.together(newcomer.decide, ten.decide, two.decide)
    assert newcomer.has_state


def test_a_round_that_one_has_not_received_is_void_for_those_that_have(run: Run) -> None:
    members = [run.member(name, ranks=3) for name in "abc"]
    run.begun(*members)
    received = [run.start(member.decide) for member in members[:2]]
    members[2].close()
    for one in received:
        with pytest.raises(MemberLostError):
            one.result(30)
    epochs = run.together(*(member.next_epoch for member in members[:2]))
    assert epochs[0].lost == ("c",)
    assert [member.name for member in epochs[1].members] == ["a", "b"]
    # what the two do from here on counts again
    run.together(members[0].decide, members[1].decide)


def test_a_failure_of_one_ends_the_epoch_for_all(run: Run) -> None:
    one, other = run.member("0"), run.member("1")
    run.begun(one, other)
    received = run.start(one.decide)
    # has received nothing, and will not
    leaving = run.start(other.next_epoch)
    with pytest.raises(MemberLostError):
        received.result(30)
    assert one.next_epoch().lost == ()
    assert leaving.result(30).number == 2
    assert other.has_state


def test_a_rank_that_stood_still_is_lost_and_comes_back_without_its_state(run: Run) -> None:
    one, other = run.member("0", lease_s=3.0), run.member("1", lease_s=3.0)
    run.begun(one, other)
    # no more signs of life, as of a process that is stopped
    pulse = other._pulse
    pulse._ended.set()
    pulse._thread.join()
    with pytest.raises(MemberLostError):
        one.decide()
    assert one.next_epoch().lost == ("1",)
    one.decide()
    pulse._ended.clear()
    pulse._thread = threading.Thread(target=pulse._run, daemon=True)
    pulse._thread.start()
    coming = run.start(other.next_epoch)
    while not one.decide():
        pass
    assert one.next_epoch().source == 0
    assert coming.result(30).number == 3
    assert not other.has_state


def test_a_process_that_does_not_fit_is_refused_and_the_others_go_on(run: Run) -> None:
    one, other = run.member("0"), run.member("1")
    run.begun(one, other)
    for stranger, words in (
        (run.member("2", settings="q=0.5"), "q=0.5"),
        (run.member("1"), "another process goes by the name '1'"),
    ):
        coming = run.start(stranger.next_epoch)
        while not any(run.together(one.decide, other.decide)):
            pass
        run.begun(one, other)
        with pytest.raises(RefusedError, match=words):
            coming.result(30)
        stranger.close()


def test_a_node_is_in_the_run_whole_or_not_at_all(run: Run) -> None:
    members = [run.member(str(n), settings="in nodes", ranks=4) for n in range(4)]
    run.begun(*members)
    members[1].close()
    waiting = run.start(members[0].next_epoch)
    epochs = run.begun(*members[2:])
    assert [member.name for member in epochs[0].members] == ["2", "3"]
    assert epochs[0].lost == ("0", "1")
    # half a node ends no epoch
    assert not any(run.together(*(member.decide for member in members[2:])))
    back = run.start(run.member("1", settings="in nodes", ranks=4).next_epoch)
    while not any(run.together(*(member.decide for member in members[2:]))):
        pass
    run.together(*(member.next_epoch for member in members[2:]))
    assert [waiting.result(30).rank, back.result(30).rank] == [0, 1]
    with pytest.raises(ValueError, match="name='a'"):
        run.member("a", settings="in nodes")


def test_nobody_waits_for_a_member_that_is_gone(run: Run) -> None:
    members = [run.member(str(rank), ranks=3) for rank in range(3)]
    epochs = run.begun(*members)

    def grouped(member: Membership, epoch: Epoch) -> WatchedGroup:
        return WatchedGroup(member.store, epoch.rank, 3, f"group{epoch.rank}", member.check)

    groups = run.together(*map(partial, [grouped] * 3, members, epochs))

    def gather(group: WatchedGroup) -> list[float]:
        rows = [torch.zeros(1) for _ in range(3)]
        dist.all_gather(rows, torch.full((1,), float(group.rank())), group=group)
        return [float(row) for row in rows]

    assert run.together(*(partial(gather, group) for group in groups))[0] == [0.0, 1.0, 2.0]
    waiting = [run.start(partial(gather, group)) for group in groups[:2]]
    members[2].close()
    for one in waiting:
        with pytest.raises(MemberLostError):
            one.result(30)
    for group in groups:
        group.leave()
    with pytest.raises(MemberLostError):
        gather(groups[0])


def test_a_group_among_some_fails_as_a_whole_one_beside_a_default_group(
    run: Run, alone: dist.ProcessGroup
) -> None:
    members = [run.member(str(rank), ranks=3) for rank in range(3)]
    epochs = run.begun(*members)

    def among(member: Membership, epoch: Epoch) -> WatchedGroup:
        group = WatchedGroup(member.store, epoch.rank, 3, f"whole{epoch.rank}", member.check)
        if epoch.rank > 0:
            group.among([1, 2])
        return group

    groups = run.together(*map(partial(partial, among), members, epochs))
    inner = groups[1]._inner[0]
    waiting = run.start(partial(dist.reduce, torch.zeros(1), 1, group=inner))
    members[2].close()
    # torch logs it by the rank in the default group, which is not in this one
    with pytest.raises((MemberLostError, ValueError)):
        waiting.result(30)
    assert groups[1].has_failed
    assert not groups[0].has_failed
    for group in groups:
        group.leave()
    assert alone.size() == 1


def test_a_lost_store_ends_every_member_with_a_sentence(run: Run) -> None:
    # in a process of its own, to be killed
    port: Any = FORKED.Queue()
    host = FORKED.Process(target=keep_store, args=(port,), daemon=True)
    host.start()
    address = f"127.0.0.1:{port.get(timeout=60)}"
    members = [run.member(name, store=address) for name in "ab"]
    run.begun(*members)
    waiting = run.start(members[0].decide)
    host.kill()
    host.join()
    for one in (waiting, run.start(members[1].decide), run.start(members[1].next_epoch)):
        with pytest.raises(ConnectionError, match="expected one that outlives every rank"):
            one.result(30)


def keep_store(port: Any) -> None:
    store = serve("127.0.0.1:0")
    port.put(store.port)
    threading.Event().wait()


def test_settings_that_are_out_of_place_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    good: dict[str, Any] = {"store": "127.0.0.1:1", "name": "0", "ranks": 2}
    for wrong, words in (
        ({"store": "nowhere"}, "store='nowhere': expected host:port"),
        ({"store": "host:99999"}, "host:port"),
        ({"name": ""}, "name=''"),
        ({"ranks": 0}, "ranks=0"),
        ({"lease_s": 0.5}, "lease_s=0.5"),
    ):
        with pytest.raises(ValueError, match=words):
            Elastic(**(good | wrong))
    with pytest.raises(TypeError, match="ranks='2'"):
        Elastic(**(good | {"ranks": "2"}))
    for variable in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ValueError, match="MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE"):
        Elastic.from_environment()
    for variable, value in (("ADDR", "127.0.0.1"), ("PORT", "1")):
        monkeypatch.setenv(f"MASTER_{variable}", value)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert Elastic.from_environment() == Elastic(store="127.0.0.1:1", name="1", ranks=3)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(RuntimeError, match="--nproc-per-node 1"):
        Elastic.from_environment()

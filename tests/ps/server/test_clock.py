"""The server's clock, which leaves out what the server itself has slept through."""

from __future__ import annotations

from ps.bench import Clock, Make, push_of

from topq_dist.ps.protocol.types import START
from topq_dist.ps.server.clock import RunningClock


def test_it_goes_on_as_long_as_it_is_asked_and_leaves_out_what_is_longer() -> None:
    source = Clock()
    clock = RunningClock(source)
    woken: list[float] = []
    clock.after_long_pause = lambda: woken.append(clock())
    began_s = clock()
    for _ in range(10):
        source.pass_s(0.5)
        clock()
    assert clock() == began_s + 5
    source.pass_s(3)
    assert clock() == began_s + 5
    assert not woken
    source.pass_s(3600)
    assert clock() == began_s + 5
    assert woken == [began_s + 5]
    source.pass_s(0.5)
    assert clock() == began_s + 5.5


def test_after_a_long_pause_all_who_were_there_have_a_whole_lease(make: Make) -> None:
    bench = make(lease_s=10.0)
    a, b, _ = (bench.join(name) for name in ("a", "b", "gone"))
    bench.clock.pass_s(5)
    bench.server.renew(a)
    bench.server.renew(b)
    bench.clock.pass_s(6)
    bench.server.renew_leases()
    bench.clock.pass_s(8)
    pending = bench.submit(push_of(a, 1, START))
    assert bench.look(pending) == ("b",)
    bench.submit(push_of(b, 1, START))
    assert bench.answer(pending).members == ("a", "b")

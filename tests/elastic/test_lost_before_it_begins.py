"""Ranks that die before they are in the run: it begins with others, and none is said to be lost."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
from forked import FORKED
from torch import nn

from topq_dist import Elastic, LocalTopQ
from topq_dist.elastic.membership import Membership
from topq_dist.elastic.store import serve

pytestmark = pytest.mark.gloo
DIED, NAMES = 9, ("0", "1", "2")


def rank_main(place: Elastic, dies_in: str, found: Any) -> None:
    """Take a step among three ranks, and tell who was in and who was lost, or what was raised."""
    torch.set_num_threads(1)
    if dies_in:
        dying: Any = getattr(Membership, dies_in)
        # the others hear of one that waits for a while
        ends_s = time.monotonic() + (3.0 if dies_in == "_propose" else 0.0)

        def dies(membership: Membership, *arguments: Any) -> Any:
            done = None if dies_in == "_enter" else dying(membership, *arguments)
            if time.monotonic() > ends_s:
                os._exit(DIED)
            return done

        setattr(Membership, dies_in, dies)
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        state = LocalTopQ(model, optimizer, every=1, q=0.5, elastic=place)
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        state.step()
        found.put((place.name, list(state.members), [one.member for one in state.lost_residuals]))
        state.close()
    except Exception as error:  # noqa: BLE001 - the test says what it expected
        found.put((place.name, repr(error), []))
    found.close()
    found.join_thread()
    os._exit(0)


# it has announced itself, alone or while another waits, and one takes its place at once; or it is a
# member, and the epoch begins
@pytest.mark.parametrize(
    ("dies_in", "before"), [("_announce", ""), ("_propose", "1"), ("_enter", "12")]
)
def test_a_rank_that_dies_before_the_run_begins_is_no_member_of_it(
    dies_in: str, before: str
) -> None:
    store = serve("127.0.0.1:0")
    found: Any = FORKED.Queue()

    def started(name: str, dies_in: str = "") -> Any:
        address = f"127.0.0.1:{store.port}"
        place = Elastic(store=address, name=name, ranks=3, lease_s=3.0)
        process = FORKED.Process(target=rank_main, args=(place, dies_in, found))
        process.start()
        return process

    others = [started(name) for name in before]
    dead = started("0", dies_in)
    dead.join(60)
    assert dead.exitcode == DIED
    others += [started(name) for name in NAMES if name not in before]
    try:
        ends = sorted(found.get(timeout=60) for _ in NAMES)
    finally:
        for one in others:
            one.join(5)
            one.kill()
    assert ends == [(name, list(NAMES), []) for name in NAMES]

"""The example of local steps must run, learn, and send little: on one machine, and on two hosts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from forked_scripts import ranks_of, run_scripts
from harness.netns import HostsError, hosts, missing_requirement

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "local_two_sites.py"


@pytest.mark.gloo
def test_two_sites_of_two_processes() -> None:
    said, *others = run_scripts(ranks_of(EXAMPLE, 4))
    assert others == [""] * 3
    _assert_learned(said)


@pytest.mark.gloo
def test_two_hosts_on_100_mbit() -> None:
    if (reason := missing_requirement()) is not None:
        pytest.skip(reason)
    try:
        with hosts(2, rate="100mbit") as made:
            ranks = ranks_of(
                EXAMPLE,
                4,
                address="10.77.0.1",
                namespaces=made.namespaces,
                variables={"GLOO_SOCKET_IFNAME": "eth0"},
            )
            said = run_scripts(ranks)
    except HostsError as error:
        pytest.skip(str(error))
    _assert_learned(said[0])


def _assert_learned(output: str) -> None:
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)]
    assert losses[-1] < losses[0] / 3
    found = re.search(r"(\d+) times fewer", output)
    assert found is not None
    assert int(found[1]) > 200

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.netns import INTERFACE, HostsError, hosts, missing_requirement

NETNS = Path("/run/netns")


@pytest.fixture
def dead_run() -> Iterator[str]:
    """A namespace as a run that was killed outright leaves it; skips where none can be made."""
    reason = missing_requirement()
    if reason is not None:
        pytest.skip(reason)
    process = subprocess.Popen(["true"])  # noqa: S607 - its pid is all that matters
    process.wait()
    name = f"topq-bench-{process.pid}-left-h0"
    added = subprocess.run(
        ["ip", "netns", "add", name],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    if added.returncode != 0:
        pytest.skip(f"no network namespaces here: {added.stderr.strip()}")
    yield name
    if (NETNS / name).exists():
        subprocess.run(["ip", "netns", "del", name], check=True)  # noqa: S607


def test_hosts_are_shaped_and_gone_after_a_failure(dead_run: str) -> None:
    seen: list[str] = []
    with pytest.raises(RuntimeError, match="in the block"):
        _look_around_and_fail(seen)
    assert len(seen) == 3
    assert [name for name in (*seen, dead_run) if (NETNS / name).exists()] == []


def _look_around_and_fail(seen: list[str]) -> None:
    with hosts(3, rate="100mbit") as made:
        seen += made.namespaces
        assert all((NETNS / name).exists() for name in seen)
        shown = _output(made.command(0, ["tc", "-j", "qdisc", "show", "dev", INTERFACE]))
        qdisc = json.loads(shown)[0]
        assert (qdisc["kind"], qdisc["options"]["rate"]) == ("tbf", 12_500_000)
        shown = _output(made.command(2, ["ip", "-j", "addr", "show", "dev", INTERFACE]))
        assert json.loads(shown)[0]["addr_info"][0]["local"] == "10.77.0.3"
        raise RuntimeError("in the block")


def test_tbf_that_refuses_its_arguments_is_quoted_and_leaves_nothing(dead_run: str) -> None:
    with pytest.raises(HostsError, match="tbf rate nonsense"), hosts(2, rate="nonsense"):
        pass
    names = {path.name for path in NETNS.iterdir()}
    assert dead_run not in names
    # those of other processes come and go
    assert not any(name.startswith(f"topq-bench-{os.getpid()}-") for name in names)


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_one_host_is_none() -> None:
    with pytest.raises(ValueError, match="count=1"), hosts(1):
        pass


def test_an_ordinary_user_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert "root" in str(missing_requirement())
    with pytest.raises(HostsError, match="need root"), hosts(2):
        pass

"""Puts this folder on the import path, so that tests share `ranks`, and prepares their process.

Where pytest-xdist runs several processes, a file stays in one, and all Docker tests in one.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

# the first example of a process may be the one for which kernels are compiled
settings.register_profile("topq", deadline=None)
settings.load_profile("topq")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell has started us in the background, and our children would ignore it as well
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Have torch compute on one thread, and afterwards on as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone() -> Iterator[dist.ProcessGroup]:
    """Have a process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep together what shares processes, images or a run; leave Ray to who asks for it."""
    if "ray" not in config.option.markexpr:
        reason = "a local Ray wants the machine for itself: pytest -m ray"
        for item in items:
            if item.get_closest_marker("ray"):
                item.add_marker(pytest.mark.skip(reason=reason))
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        together = item.path.parent if item.get_closest_marker("docker") else item.path
        item.add_marker(pytest.mark.xdist_group(str(together)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse to go on where tests are not kept together as said above."""
    grouped = session.config.getoption("loadgroup", default=False)
    if grouped and session.items and "@" not in session.items[0].nodeid:
        raise pytest.UsageError(
            f"pytest {pytest.__version__} loses the groups of pytest-xdist: expected the versions "
            "of constraints.txt"
        )

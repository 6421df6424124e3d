"""Scripts as users run them, in processes that have torch already: seconds a process less."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from forked_process import ForkedProcess, Place, run_script
from server_process import quiet_port

_CLONE_NEWNET, _CLONE_NEWNS = 0x40000000, 0x00020000
_MS_REC, _MS_SLAVE, _MNT_DETACH = 1 << 14, 1 << 19, 2


@dataclass(frozen=True, kw_only=True)
class Script:
    """A run of a script on its own.

    words: behind its name. variables: beside this process's. folder: in which it runs, the present
    one by default. namespace: of the network it is in.
    """

    path: Path
    words: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    namespace: str | None = None


def ranks_of(
    path: Path,
    ranks: int,
    *,
    address: str = "127.0.0.1",
    namespaces: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> list[Script]:
    """Return the runs that torchrun starts on one machine or in namespaces, without torchrun.

    address: of the first rank. namespaces: which share the ranks alike, in their order.
    """
    here = ranks // len(namespaces) if namespaces else ranks
    shared = {"MASTER_ADDR": address, "MASTER_PORT": str(quiet_port())} | dict(variables or {})
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(here)}
    return [
        Script(
            path=path,
            variables=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank % here)},
            namespace=namespaces[rank // here] if namespaces else None,
        )
        for rank in range(ranks)
    ]


def run_scripts(scripts: Sequence[Script], *, timeout_s: float = 150) -> list[str]:
    """Run scripts beside each other; return what each has written to stdout.

    Raises AssertionError with what all have written to stderr where one fails or does not end, and
    ends the others.
    """
    running = [
        ForkedProcess(
            _run,
            script,
            place=Place(variables={**os.environ, **script.variables}, folder=script.folder),
        )
        for script in scripts
    ]
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        codes = [process.exit_code for process in running]
        if all(code == 0 for code in codes) or any(codes):
            break
        time.sleep(0.02)
    for process in running:
        process.kill()
    assert codes == [0] * len(running), (codes, [process.errors for process in running])
    return [process.output for process in running]


def _run(script: Script) -> None:
    if script.namespace is not None:
        _enter(script.namespace)
    run_script(script.path, *script.words)


def _enter(namespace: str) -> None:
    """Be on another host, with its own /sys, as `ip netns exec` would have it."""
    libc = ctypes.CDLL(None, use_errno=True)
    # os.setns begins with Python 3.12
    with (Path("/run/netns") / namespace).open() as file:
        failed = libc.setns(file.fileno(), _CLONE_NEWNET)
    failed = failed or libc.unshare(_CLONE_NEWNS)
    failed = failed or libc.mount(b"", b"/", b"none", _MS_SLAVE | _MS_REC, None)
    libc.umount2(b"/sys", _MNT_DETACH)
    failed = failed or libc.mount(namespace.encode(), b"/sys", b"sysfs", 0, None)
    if failed:
        raise OSError(ctypes.get_errno(), f"network namespace {namespace} cannot be entered")

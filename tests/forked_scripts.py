"""Scripts as users run them, in processes that have torch already: seconds a process less."""

from __future__ import annotations

import ctypes
import os
import runpy
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
from forked import FORKED
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


def run_scripts(scripts: Sequence[Script], folder: Path, *, timeout_s: float = 150) -> list[str]:
    """Run scripts beside each other; return what each has written to stdout.

    Raises AssertionError with what it has written to stderr where one fails or does not end, and
    ends the others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    streams = [
        (folder / f"script{number}.stdout", folder / f"script{number}.stderr")
        for number in range(len(scripts))
    ]
    processes = [
        FORKED.Process(target=_run, args=(script, *files), daemon=True)
        for script, files in zip(scripts, streams, strict=True)
    ]
    for process in processes:
        process.start()
    try:
        _await(processes, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.join()
    codes = [process.exitcode for process in processes]
    assert codes == [0] * len(scripts), (codes, [errors.read_text() for _, errors in streams])
    return [output.read_text() for output, _ in streams]


def _await(processes: Sequence[ForkServerProcess], deadline_s: float) -> None:
    while time.monotonic() < deadline_s:
        codes = [process.exitcode for process in processes]
        if all(code == 0 for code in codes) or any(codes):
            return
        time.sleep(0.02)


def _run(script: Script, output: Path, errors: Path) -> None:
    for number, path in enumerate((output, errors), start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    if script.namespace is not None:
        _enter(script.namespace)
    os.environ.update(script.variables)
    if script.folder is not None:
        os.chdir(script.folder)
    torch.set_num_threads(1)
    sys.argv = [str(script.path), *script.words]
    failed = 1
    try:
        runpy.run_path(str(script.path), run_name="__main__")
        failed = 0
    finally:
        if failed:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # in Python's shutdown torch's gloo threads abort one process in a hundred
        os._exit(failed)


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

"""Points at which a server process of a test kills itself, as kill -9 does."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _crash_in(owner: Any, name: str, *, at_call: int, after: bool = False) -> None:
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def crashing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at_call and not after:
            _die()
        result = original(*arguments, **options)
        if calls == at_call:
            _die()
        return result

    setattr(owner, name, crashing)


def arm(crash_at: str) -> None:
    """Have this process kill itself at "POINT CALL": the CALL-th time that it comes to POINT."""
    from topq_dist.ps.state import snapshot_file, state_dir
    from topq_dist.ps.state.run_state import RunState

    point, call = crash_at.split()
    at_call = int(call)
    if point == "before-apply":
        _crash_in(RunState, "apply", at_call=at_call)
    elif point == "after-apply":
        _crash_in(RunState, "apply", at_call=at_call, after=True)
    elif point == "mid-write":
        _crash_in(snapshot_file, "_write", at_call=at_call, after=True)
    elif point == "mid-snapshot":
        _crash_in(os, "fsync", at_call=at_call)
    elif point == "before-rename":
        _crash_in(state_dir, "_rename", at_call=at_call)
    elif point == "after-rename":
        _crash_in(state_dir, "_rename", at_call=at_call, after=True)
    else:
        raise ValueError(f"crash_at={crash_at!r}: no such point")

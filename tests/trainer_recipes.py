"""Runs of the examples in environments with one trainer each, and what they have saved."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainer_env import ROOT, NoNetworkError, make_environment

_FORKED = Path(__file__).parent / "integrations" / "forked_ranks.py"
# totals of one process, and seconds
_OWN_TOTALS = re.compile(r"stats\.(sent_bytes|wire_bytes|\w+_s)$")


def environment(extra: str) -> Path:
    """Return the Python of an environment with this extra alone; skips without a network."""
    try:
        return make_environment(extra)
    except NoNetworkError as error:
        pytest.skip(str(error))


def ranks_with(*modules: str) -> list[str | Path]:
    """Return how Python runs a script on two ranks that have these modules already."""
    return [_FORKED, "2", ",".join(["torch._dynamo", "topq_dist.ddp", *modules])]


def run(python: Path, *arguments: str | Path, fails: bool = False) -> str:
    """Return what a command has written, which must end well, or must not."""
    done = subprocess.run(
        [python, *arguments],
        env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    said = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, said
    return said


def example(name: str) -> Path:
    return ROOT / "examples" / name


def check_hook_was_called(said: str, *, steps: int) -> None:
    found = re.search(r"(\d+) steps with (\d+) times fewer bytes", said)
    assert found is not None, said
    assert int(found[1]) == steps
    assert int(found[2]) > 50


def numbers(saved: object, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all that is in nested dicts and lists, with its place."""
    if isinstance(saved, Mapping):
        for key, value in saved.items():
            yield from numbers(value, f"{name}.{key}")
    elif isinstance(saved, list | tuple):
        for place, value in enumerate(saved):
            yield from numbers(value, f"{name}.{place}")
    else:
        yield name, saved


def check_same(one: object, other: object) -> None:
    """Check that two states are the same to the bit, seconds and one process' bytes aside."""
    left, right = dict(numbers(one)), dict(numbers(other))
    assert left.keys() == right.keys()
    assert any(isinstance(value, Tensor) for value in left.values())
    differ = [
        name
        for name, value in left.items()
        if not _OWN_TOTALS.search(name) and not _equal(value, right[name])
    ]
    assert differ == []


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


def check_file(one: Path, other: Path, *places: str) -> None:
    """Check that two files have the same to the bit, in these places or everywhere.

    places: keys with dots between them.
    """
    for place in places or ("",):
        check_same(*(_at(torch.load(path, weights_only=True), place) for path in (one, other)))


def _at(saved: Any, place: str) -> Any:
    for key in place.split(".") if place else ():
        saved = saved[key]
    return saved

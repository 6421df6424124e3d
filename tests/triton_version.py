"""Which Triton the tests under its interpreter want."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version

_OLDEST = "3.9"


def check_interpreter() -> None:
    """Skip where Triton's interpreter is older: it would write into arrays that are read-only.

    A torch made for GPUs brings a Triton of its own, which is older as a rule.
    """
    found = version("triton")
    if Version(found) < Version(_OLDEST):
        reason = f"the interpreter of triton {found}: expected {_OLDEST} or newer"
        pytest.skip(reason, allow_module_level=True)

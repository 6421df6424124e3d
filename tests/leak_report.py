"""The report that triton's bindings may write to stderr as a process ends, left out in tests.

torch imports triton where it is installed, as soon as an optimizer is made; on a machine without a
GPU nothing of ours does.
"""

from __future__ import annotations

import re

_REPORT = re.compile(
    r"^nanobind: leaked \d+ (?:instances|keep_alive records|types|functions)!\n"
    r"(?: - (?:leaked (?:instance|type|function) .*|\.\.\. skipped remainder)\n)*"
    r"|^nanobind: this is likely caused by a reference counting issue in the binding code\.\n"
    r"|^See https://nanobind\.readthedocs\.io/\S*(?:\n|\Z)",
    re.MULTILINE,
)


def without_leak_report(errors: str) -> str:
    """Return what was written to stderr without nanobind's report on leaks."""
    return _REPORT.sub("", errors)

"""Triton runs as its interpreter in a process that collects these tests."""

from __future__ import annotations

import interpreted  # noqa: F401 - before anything imports the kernels

"""Leaves out the tests that start a local Ray unless they are asked for."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "ray" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("ray"):
            reason = "a local Ray wants the machine for itself: pytest -m ray"
            item.add_marker(pytest.mark.skip(reason=reason))

"""References are computed as the ranks compute: on one thread, or matrix products differ."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def on_one_thread(one_thread: None) -> None:
    """Have every test of this room compute on one thread."""

"""A coordinator for each test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ps.bench import NEVER, Bench, Make

from topq_dist.ps.protocol.config import ServingConfig, TrainingConfig


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Bench] = []

    def make_bench(training: dict[str, Any] | None = None, **serving: Any) -> Bench:
        options = {"inner_opt": "sgd", "options": {"lr": 1.0, "momentum": 0.5}} | (training or {})
        serving = {"snapshot_every": NEVER, "lease_s": 10.0} | serving
        path = tmp_path / str(len(made))
        made.append(Bench(path, TrainingConfig(**options), ServingConfig(**serving)))
        return made[-1]

    yield make_bench
    for bench in made:
        bench.server._snapshotter.close()
        bench.state_dir.close()

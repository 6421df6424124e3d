"""A parameter server inside the test's process; one to be killed is a ServerProcess."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from topq_dist.ps.protocol.config import ServingConfig, TrainingConfig
from topq_dist.ps.security.policy import ServerSecurity
from topq_dist.ps.server.process import ParameterServer

Options = dict[str, Any]


@contextmanager
def serving(
    state_dir: Path, training: Options, *, security: ServerSecurity | None = None, **options: Any
) -> Iterator[ParameterServer]:
    """Run a server in this process: keyword arguments of TrainingConfig, then of ServingConfig."""
    server = ParameterServer(
        TrainingConfig(**training),
        ServingConfig(**options),
        state_dir=state_dir,
        address="127.0.0.1:0",
        security=security,
    )
    try:
        yield server
    finally:
        server.stop()

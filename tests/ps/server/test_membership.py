"""The log of a server about workers that come and go."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from topq_dist.ps.model.flat import FlatModel
from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.protocol.config import ServingConfig, TrainingConfig
from topq_dist.ps.protocol.types import START, ModelVersion
from topq_dist.ps.server.coordinator import Coordinator
from topq_dist.ps.server.requests import JoinCall
from topq_dist.ps.state.state_dir import StateDir

SPEC = ModelSpec.of([("w", torch.zeros(4))])


def call(
    run: str, *, instance: bytes, epoch: int = 0, held: ModelVersion | None = None
) -> JoinCall:
    return JoinCall(
        run=run,
        worker="a",
        instance=instance,
        epoch=epoch,
        next_sequence=0,
        held=held,
        first_kept=0,
        spec=SPEC,
    )


def test_a_worker_is_named_once_when_it_comes_and_once_when_it_goes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="topq_dist.ps.server.membership")
    server = Coordinator(TrainingConfig(inner_opt="sgd"), ServingConfig(), StateDir(tmp_path))
    try:
        first, second = b"1" * 16, b"2" * 16
        joined = server.join(call("", instance=first))
        server.upload(joined.caller, FlatModel(SPEC).raw())
        server.join(call(server.run, instance=first, epoch=1, held=START))
        assert caplog.messages == ["worker a joined, epoch 1"]
        taken_over = server.join(call("", instance=second))
        for _ in range(2):
            server.leave(taken_over.caller)
        assert caplog.messages[1:] == ["worker a joined, epoch 2", "worker a left"]
    finally:
        server.drain()

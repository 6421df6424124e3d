"""Messages about a worker's numbers fit a gRPC status, however many it sends."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ps.training.test_central import SINGLE, push_of, random_gradients, random_model

from topq_dist.ps.protocol.config import TrainingConfig
from topq_dist.ps.protocol.errors import InvalidError, NonFiniteError
from topq_dist.ps.protocol.types import START, PushRecord, push_digest
from topq_dist.ps.training.central import CentralModel
from topq_dist.ps.wire.steps import push_from_wire, step_header
from topq_dist.v1 import parameter_server_pb2 as pb

MANY = (0.123456789,) * 100_000
LONGEST = 200


@pytest.mark.parametrize("inner_opt", ["adagrad", "adamw"])
@pytest.mark.parametrize("field", ["lr", "momentum"])
def test_of_too_many_numbers_their_number_is_said(inner_opt: str, field: str) -> None:
    model = random_model(SINGLE)
    central = CentralModel(TrainingConfig(inner_opt=inner_opt), model.spec, model)
    push = push_of(model, random_gradients(model, torch.Generator().manual_seed(0)))
    changed = {"lr": {"lr": MANY}, "momentum": {"momentum": MANY}}[field]
    with pytest.raises(InvalidError, match="100000") as caught:
        central.check_push(dataclasses.replace(push, **changed))  # type: ignore[arg-type]
    assert len(str(caught.value)) < LONGEST


@pytest.mark.parametrize(("rate", "error"), [(float("inf"), NonFiniteError), (-1.0, InvalidError)])
def test_of_many_rates_the_first_that_is_none_is_named(rate: float, error: type[Exception]) -> None:
    rates = (*MANY, rate)
    push = PushRecord(sequence=1, base=START, frames=(), lr=rates, digest=push_digest(rates, []))
    header = step_header(pb.WorkerId(worker="w", epoch=1), push)
    with pytest.raises(error, match=f"lr={rate}") as caught:
        push_from_wire(header, [], random_model(SINGLE).spec)
    assert len(str(caught.value)) < LONGEST

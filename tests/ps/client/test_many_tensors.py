"""Models of more tensors than one message can list join in pieces, or are refused at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from ps.servers import serving
from torch import nn

from topq_dist.ps import ParameterServerOptimizer
from topq_dist.ps.protocol.errors import InvalidError, TooLargeError
from topq_dist.ps.server.service import ParameterServerService
from topq_dist.ps.wire import codec
from topq_dist.ps.wire.messages import Calls
from topq_dist.v1 import parameter_server_pb2 as pb

PLAIN = {"inner_opt": "sgd", "options": {"lr": 0.5}}
NAME = "model.layers.{}.mlp.experts.{}.down_proj.lora_A.default.weight." + 3_000 * "x"


def named(count: int) -> list[tuple[str, nn.Parameter]]:
    """Return parameters whose names, long for speed, take 3 kB each."""
    return [(NAME.format(n // 64, n % 64), nn.Parameter(torch.zeros(1))) for n in range(count)]


def connect(parameters: list[tuple[str, nn.Parameter]], address: object) -> Any:
    return ParameterServerOptimizer(
        parameters, str(address), worker="a", q=0.0, value_format=None, timeout_s=60
    )


def test_they_join_step_and_come_back(tmp_path: Path) -> None:
    parameters = named(1_600)
    with serving(tmp_path, PLAIN) as server:
        optimizer = connect(parameters, server.address)
        for step in range(2):
            for place, (_, parameter) in enumerate(parameters):
                parameter.grad = torch.full((1,), float(place)) if place % 2 or step else None
            optimizer.step()
        state = optimizer.state_dict()
        optimizer.close()
        again = connect(named(1_600), server.address)
        again.load_state_dict(state)
        again.close()
    moved = torch.cat([parameter.detach() for _, parameter in parameters])
    times = torch.arange(1_600) % 2 + 1
    assert torch.equal(moved, -0.5 * times * torch.arange(1_600))


def test_a_list_beyond_any_limit_is_refused_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "MAX_JOIN_BYTES", 3 << 20)
    with serving(tmp_path, PLAIN) as server:
        began_s = time.monotonic()
        with pytest.raises(TooLargeError, match=r"names and shapes of the model's tensors take \d"):
            connect(named(1_600), server.address)
        assert time.monotonic() - began_s < 30
        assert server.coordinator.status().refused == {}


def test_a_server_that_takes_no_pieces_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(service: Any, requests: Any, context: grpc.ServicerContext) -> None:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")

    monkeypatch.setattr(ParameterServerService, "LongJoin", unknown)
    with serving(tmp_path, PLAIN) as server:
        with pytest.raises(TooLargeError, match=r"takes no model of 1600 tensors.*this version of"):
            connect(named(1_600), server.address)
        assert len(connect(named(4), server.address).param_groups[0]["params"]) == 4


class TestTheServer:
    def call(self, server: Any, *parts: pb.JoinPart | memoryview) -> pb.JoinResponse:
        with grpc.insecure_channel(str(server.address)) as channel:
            return codec.read_join_parts(
                iter(Calls(channel).LongJoin(iter(parts), timeout=20)), pb.JoinResponse
            )

    @pytest.mark.parametrize(
        ("parts", "code", "words"),
        [
            ((), "INVALID_ARGUMENT", "without its length"),
            ((memoryview(b"x"),), "INVALID_ARGUMENT", "without its length"),
            ((pb.JoinPart(),), "INVALID_ARGUMENT", "without its length"),
            ((pb.JoinPart(total_bytes=1 << 40),), "RESOURCE_EXHAUSTED", "at most"),
            ((pb.JoinPart(total_bytes=9),), "INVALID_ARGUMENT", "ended after 0 of 9"),
            ((pb.JoinPart(total_bytes=1), memoryview(b"xy")), "INVALID_ARGUMENT", "goes on after"),
            ((pb.JoinPart(total_bytes=1), memoryview(b"\xff")), "INVALID_ARGUMENT", "no message"),
            ((pb.JoinPart(total_bytes=0),), "INVALID_ARGUMENT", "worker=''"),
        ],
    )
    def test_refuses_what_is_no_join(
        self, tmp_path: Path, parts: tuple[Any, ...], code: str, words: str
    ) -> None:
        with serving(tmp_path, PLAIN) as server, pytest.raises(grpc.RpcError) as caught:
            self.call(server, *parts)
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode[code]
        assert words in str(caught.value.details())

    def test_makes_nothing_of_more_tensors_than_any_model_has(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(codec, "MOST_TENSORS", 1_000)
        said = "model of 1600 tensors: expected at most 1000"
        with serving(tmp_path, PLAIN) as server, pytest.raises(InvalidError, match=said):
            connect(named(1_600), server.address)

    def test_takes_in_one_at_a_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        alone: list[bool] = []
        join = ParameterServerService.Join

        def looking(service: Any, request: Any, context: Any) -> Any:
            alone.append(service._long_join.locked())
            return join(service, request, context)

        monkeypatch.setattr(ParameterServerService, "Join", looking)
        with serving(tmp_path, PLAIN) as server:
            connect(named(1_600), server.address).close()
        assert alone
        assert all(alone)

    def test_reads_one_list_at_a_time(self, tmp_path: Path) -> None:
        with serving(tmp_path, PLAIN) as server:
            with grpc.insecure_channel(str(server.address)) as channel:

                def slow() -> Any:
                    yield pb.JoinPart(total_bytes=9)
                    words = ""
                    while "another worker with a long list" not in words:
                        with pytest.raises(grpc.RpcError) as caught:
                            self.call(server, pb.JoinPart(total_bytes=9))
                        words = str(caught.value)
                    yield memoryview(b"\xff" * 9)

                with pytest.raises(grpc.RpcError, match="no message of its kind"):
                    list(Calls(channel).LongJoin(slow(), timeout=30))
            with pytest.raises(grpc.RpcError, match="ended after 0 of 9"):
                self.call(server, pb.JoinPart(total_bytes=9))

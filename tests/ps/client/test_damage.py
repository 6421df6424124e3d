"""Bytes damaged on their way end no worker and change no number: a call is tried again."""

from __future__ import annotations

import contextlib
from pathlib import Path

import grpc
import pytest
import torch
from google.protobuf.message import DecodeError
from ps.certificates import Authority
from ps.client.test_optimizer import SGD, connect
from ps.damaging_proxy import damaging
from ps.servers import Options, serving
from ps.workers import backward, batch, make_model, values
from torch import Tensor

from topq_dist.compress.codec.frame import FrameError
from topq_dist.ps import ParameterServerOptimizer, RefusedError, ServerLostError
from topq_dist.ps.client import connection, outcome, retry_deadline
from topq_dist.ps.client.call_errors import DoubtfulError, TransientError, UnreachedError
from topq_dist.ps.client.connection import Connection
from topq_dist.ps.client.retry_deadline import RetryDeadline
from topq_dist.ps.client.server_client import ServerClient
from topq_dist.ps.model.flat import FlatModel
from topq_dist.ps.model.spec import ModelSpec
from topq_dist.ps.protocol.errors import DamagedError, InvalidError, TooLargeError
from topq_dist.ps.protocol.types import Answer, ModelVersion, Update, UpdateKind
from topq_dist.ps.security.policy import ClientSecurity, ServerSecurity
from topq_dist.ps.security.tls import ClientTls, ServerTls
from topq_dist.ps.wire import steps
from topq_dist.v1 import parameter_server_pb2 as pb

STEPS = 24


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    model = make_model()
    with (
        serving(tmp_path_factory.mktemp("undisturbed"), SGD) as server,
        connect(model, server) as optimizer,
    ):
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(model, [batch(0, step)])
            optimizer.step()
    return values(model)


@pytest.mark.parametrize("over_tls", [False, True], ids=["in the clear", "over TLS"])
@pytest.mark.parametrize("downlink", ["exact", "dense"])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_through_a_bad_link_ends_where_one_through_a_good_one_does(
    tmp_path: Path,
    authority: Authority,
    undisturbed: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    over_tls: bool,
    downlink: str,
    seed: int,
) -> None:
    # where the end of a message is lost, both sides wait
    monkeypatch.setattr(connection, "_SHORT_CALL_S", 1.0)
    security, tls = None, None
    if over_tls:
        pair = authority.issue("server", server=True)
        security = ServerSecurity(tls=ServerTls(certificate=pair.certificate, key=pair.key))
        tls = ClientTls(ca=authority.certificate)
    model = make_model()
    training: Options = {**SGD, "downlink": downlink}
    with (
        serving(tmp_path, training, security=security) as server,
        # in the clear nothing covers HTTP/2's headers: now and then a call is lost with them
        damaging(
            server.address,
            every_bytes=10_000 if over_tls else 5_000,
            seed=seed,
            spares=0 if over_tls else 350,
        ) as link,
    ):
        optimizer = ParameterServerOptimizer(
            model.named_parameters(),
            link.address,
            worker="w0",
            q=0.0,
            timeout_s=40,
            tls=tls,
        )
        link.active = True
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(model, [batch(0, step)])
            optimizer.step()
        link.active = False
        optimizer.close()
        assert link.flips > 0
        assert server.coordinator.status().point.version == STEPS
    assert torch.equal(values(model), undisturbed)


class TestWhatAnotherTryCures:
    @pytest.mark.parametrize(
        ("code", "details", "expected"),
        [
            ("UNAVAILABLE", "Socket closed", UnreachedError),
            ("UNKNOWN", "Stream removed", TransientError),
            ("DATA_LOSS", "", TransientError),
            ("INTERNAL", "Exception deserializing response!", TransientError),
            ("RESOURCE_EXHAUSTED", "Concurrent RPC limit exceeded!", TransientError),
            (
                "RESOURCE_EXHAUSTED",
                "SERVER: Received message larger than max (5242880 vs. 4194304)",
                TooLargeError,
            ),
            (
                "RESOURCE_EXHAUSTED",
                "Stream removed (CLIENT: Received message larger than max (5 vs. 4))",
                TooLargeError,
            ),
            ("UNKNOWN", "Exception calling application: 'x'", ServerLostError),
            ("UNIMPLEMENTED", "Method not found!", ServerLostError),
            ("PERMISSION_DENIED", "by a proxy", ServerLostError),
        ],
    )
    def test_is_told_by_status_and_grpcs_words(
        self, code: str, details: str, expected: type[Exception]
    ) -> None:
        class Failed(grpc.RpcError, grpc.Call):
            def code(self) -> grpc.StatusCode:
                return grpc.StatusCode[code]

            def details(self) -> str:
                return details

            def trailing_metadata(self) -> tuple[()]:
                return ()

        # as gRPC's own, it need not do what a call does that is under way
        Failed.__abstractmethods__ = frozenset()
        link = Connection("127.0.0.1:1", ClientSecurity())
        try:
            with pytest.raises((TransientError, DoubtfulError)) as caught, link._errors():
                raise Failed()  # type: ignore[abstract]
        finally:
            link.close()
        error = caught.value
        final = error.final if isinstance(error, DoubtfulError) else error
        assert type(final) is expected
        assert details in str(final)

    def test_is_tried_a_few_times(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(retry_deadline, "_FIRST_PAUSE_S", 0.0)
        link = Connection("127.0.0.1:1", ClientSecurity())
        deadline, error = RetryDeadline(link, 10), DamagedError("damaged")
        for _ in range(3):
            deadline.doubt(error)
        with pytest.raises(DamagedError):
            deadline.doubt(error)
        link.close()


def test_an_answer_that_stays_wrong_is_an_error_and_the_step_is_finished_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    with serving(tmp_path, SGD) as server, connect(model, server) as optimizer:
        backward(model, [batch(0, 0)])
        with monkeypatch.context() as patch:
            patch.setattr(
                connection, "read_short_answer", lambda *_: refuse("an answer of no server")
            )
            patch.setattr(connection, "read_answer", lambda *_, **__: refuse("of no server"))
            with pytest.raises(InvalidError, match="of no server"):
                optimizer.step()
        optimizer.step()
        assert server.coordinator.status().point.version == 1


def test_a_second_damaged_update_does_not_apply_the_first_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that lags gets several updates in one answer, and holds some when one is damaged."""
    training: Options = {"inner_opt": "sgd", "options": {"lr": 0.1}, "mode": "async"}
    training |= {"downlink": "topq", "q": 0.95}
    late, other = make_model(), make_model()
    with (
        serving(tmp_path, training) as server,
        connect(late, server, worker=0) as behind,
        connect(other, server, worker=1) as ahead,
    ):
        for step in range(3):
            ahead.zero_grad()
            backward(other, [batch(1, step)])
            ahead.step()
        whole, seen = steps.answer_from_wire, []

        def damaged(message, payloads, spec):  # type: ignore[no-untyped-def]
            answer = whole(message, payloads, spec)
            seen.append(len(answer.updates))
            if len(seen) == 1:
                payload = bytearray(answer.updates[2].payloads[0])
                payload[-1] ^= 1
                object.__setattr__(answer.updates[2], "payloads", (memoryview(bytes(payload)),))
            return answer

        monkeypatch.setattr(steps, "answer_from_wire", damaged)
        backward(late, [batch(0, 0)])
        behind.step()
        assert seen == [4, 4]
        client: ServerClient = behind._clients[0]
        assert client.point.version == 4
        held = FlatModel(client.model.spec)
        held.load_raw(server.coordinator._started().central.workers_raw())
    for one, right in zip(client.model.flats, held.flats, strict=True):
        assert torch.equal(one, right)


def test_a_bit_of_an_answer_is_not_flipped_unseen() -> None:
    answer = Answer(
        applied=ModelVersion(version=5, chain=bytes(range(32))),
        members=("a", "b"),
        updates=tuple(
            Update(
                kind=kind,
                point=ModelVersion(version=version, chain=bytes([version]) * 32),
                payloads=(memoryview(bytes(100 + version)),),
            )
            for version, kind in ((4, UpdateKind.SET), (5, UpdateKind.ADD))
        ),
        durable_version=3,
    )
    spec = ModelSpec.of([("w", torch.zeros(400))])
    raw = steps.answer_message(answer).SerializeToString()
    assert len(steps.receiver_of_answer(pb.StepAnswer.FromString(raw), spec)._edges) == 3
    seen = 0
    for bit in range(8 * len(raw)):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(DecodeError):
            message = pb.StepAnswer.FromString(bytes(damaged))
            if not message.HasField("checksum"):  # its own tag, as one of many
                continue
            with pytest.raises((DamagedError, InvalidError)):
                steps.receiver_of_answer(message, spec)
            seen += 1
    assert seen > 4 * len(raw)
    old = pb.StepAnswer.FromString(raw)
    old.ClearField("checksum")
    steps.receiver_of_answer(old, spec)


def test_a_frame_that_stays_damaged_is_an_error_that_names_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_frame(*_: object) -> None:
        raise FrameError("a frame with another checksum")

    monkeypatch.setattr(outcome, "apply_update", no_frame)
    monkeypatch.setattr(retry_deadline, "_FIRST_PAUSE_S", 0.0)
    model = make_model()
    with serving(tmp_path, SGD) as server, connect(model, server) as optimizer:
        backward(model, [batch(0, 0)])
        with pytest.raises(DamagedError, match=rf"{server.address}: a frame with another"):
            optimizer.step()
        monkeypatch.undo()
        optimizer.step()
        assert server.coordinator.status().point.version == 1


def refuse(what: str) -> None:
    raise InvalidError(what)


def test_what_a_server_says_in_its_own_words_is_believed_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, SGD) as server, connect(make_model(), server):
        other = torch.nn.Linear(3, 3)
        with pytest.raises(RefusedError, match="missing here"):
            connect(other, server, worker=1)
        assert server.coordinator.status().refused == {"model_differs": 1}

"""Refusals of a server: with which status, in which words, counted how, and without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
from ps.server.bad_joins import BAD_JOINS, other_models
from ps.server.bad_pushes import BAD_PUSHES, Pushed, chunk_of
from ps.server.guarded_run import CALLS, Act, Run
from ps.strangers import CALL_S, TOKENS, Worker, gradients, guarded

from topq_dist.ps.client.probe import NoAnswerError, ask_status
from topq_dist.ps.protocol.errors import REASON_KEY
from topq_dist.ps.security.policy import ClientSecurity
from topq_dist.ps.security.tls import ClientTls
from topq_dist.ps.wire import codec
from topq_dist.v1 import parameter_server_pb2 as pb

LONGEST_MESSAGE = 2_000
SERVICE = "/topq_dist.v1.ParameterServer"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with guarded(tmp_path_factory.mktemp("guarded")) as place:
        zombie, alice = place.worker("alice"), place.worker("alice")
        zombie.join()
        alice.join()
        made = Run(place=place, alice=alice, zombie=zombie, applied=[])
        for _ in range(3):
            made.step()
        yield made
        # nobody can fill the server's log, and it ends in good order
        assert place.served.stop() == (0, "", "")


def refused_by(run: Run, act: Act) -> grpc.Call:
    before = run.place.status()
    with pytest.raises(grpc.RpcError) as caught:
        act(run)
    after = run.place.status()
    assert after.state_sha256 == before.state_sha256 != ""
    assert after.point == before.point
    assert [worker.worker for worker in after.workers] == ["alice"]
    error = caught.value
    assert isinstance(error, grpc.Call)
    reasons = [value for key, value in error.trailing_metadata() or () if key == REASON_KEY]
    counted = {
        reason: count - before.refused.get(reason, 0)
        for reason, count in after.refused.items()
        if count != before.refused.get(reason, 0)
    }
    assert counted == {str(reason): 1 for reason in reasons}
    run.step()
    return error


def check(run: Run, act: Act, code: str, reason: str, words: tuple[str, ...]) -> None:
    error = refused_by(run, act)
    details = error.details() or ""
    assert error.code().name == code, details
    reasons = [value for key, value in error.trailing_metadata() or () if key == REASON_KEY]
    assert reasons == [reason], details
    for word in words:
        assert word in details
    assert len(details) <= LONGEST_MESSAGE


# who speaks

IN_A_NAME = pytest.mark.parametrize("call", CALLS)


@IN_A_NAME
def test_no_token(run: Run, call: str) -> None:
    words = ("no token", "authorization: Bearer")
    check(
        run,
        lambda run: CALLS[call](run.as_alice(None)),
        "UNAUTHENTICATED",
        "unauthenticated",
        words,
    )


@IN_A_NAME
def test_an_unknown_token(run: Run, call: str) -> None:
    words = ("unknown token", "tokens file")
    check(
        run,
        lambda run: CALLS[call](run.as_alice("x" * 32)),
        "UNAUTHENTICATED",
        "unauthenticated",
        words,
    )


@IN_A_NAME
def test_another_workers_token(run: Run, call: str) -> None:
    words = ("worker='alice'", "is of 'bob'")
    check(
        run,
        lambda run: CALLS[call](run.as_alice(TOKENS["bob"])),
        "PERMISSION_DENIED",
        "permission_denied",
        words,
    )


@pytest.mark.parametrize("token", [None, "x" * 32])
def test_status_wants_a_token_too(run: Run, token: str | None) -> None:
    def ask(run: Run) -> None:
        run.as_alice(token).stub.Status(pb.StatusRequest(), timeout=CALL_S)

    check(run, ask, "UNAUTHENTICATED", "unauthenticated", ("token",))


def test_wrong_certificates_do_not_get_through_the_handshake(run: Run) -> None:
    place = run.place
    expired = place.ours.issue("expired", server=False, days=-1)
    foreign = place.foreign.issue("client", server=False)
    channels = {
        "wrong CA at the client": place.channel(TOKENS["alice"], ca=place.foreign.certificate),
        "wrong CA at the server": place.channel(TOKENS["alice"], pair=foreign),
        "expired": place.channel(TOKENS["alice"], pair=expired),
        "none": place.channel_without_certificate(TOKENS["alice"]),
    }
    for name, channel in channels.items():
        error = refused_by(run, lambda run, to=channel: CALLS["renew"](speaker(run, to)))  # type: ignore[misc]
        assert error.code() is grpc.StatusCode.UNAVAILABLE, name


def speaker(run: Run, channel: grpc.Channel) -> Worker:
    worker = Worker("alice", channel)
    worker.id = run.alice.id
    return worker


def test_people_are_told_what_is_wrong_with_their_certificates(run: Run) -> None:
    place = run.place
    pair, foreign = place.pair, place.foreign.issue("client", server=False)
    expired = place.ours.issue("expired", server=False, days=-1)
    ca, other_ca = place.ours.certificate, place.foreign.certificate
    cases = [
        (ClientTls(ca=other_ca, certificate=pair.certificate, key=pair.key), "does not hold"),
        (ClientTls(ca=ca, certificate=foreign.certificate, key=foreign.key), "does not take"),
        (ClientTls(ca=ca), "without certificate"),
        (None, "speaks TLS"),
    ]
    for tls, words in cases:
        security = ClientSecurity(tls=tls)
        with pytest.raises(NoAnswerError, match=words):
            ask_status(place.served.address, security, timeout_s=10)
    late = ClientTls(ca=ca, certificate=expired.certificate, key=expired.key)
    with pytest.raises(ValueError, match="expired"):
        ask_status(place.served.address, ClientSecurity(tls=late), timeout_s=10)


# what is in a push


@pytest.mark.parametrize("case", BAD_PUSHES)
def test_a_push_that_is_none(run: Run, case: str) -> None:
    check(run, *BAD_PUSHES[case])


@pytest.mark.parametrize(
    "case", [case for case in BAD_PUSHES if isinstance(BAD_PUSHES[case][0], Pushed)]
)
def test_a_push_in_one_message_that_is_none(run: Run, case: str) -> None:
    act, code, reason, words = BAD_PUSHES[case]
    assert isinstance(act, Pushed)
    check(run, act.in_one_message, code, reason, words)


def test_a_message_over_the_limit_is_not_even_read(run: Run) -> None:
    before = run.place.status()
    with pytest.raises(grpc.RpcError, match="larger than max") as caught:
        chunk_of(5 << 20)(run)
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert run.place.status().state_sha256 == before.state_sha256
    run.step()


# who pushes, and where


def test_a_stale_epoch(run: Run) -> None:
    words = ("'alice' in epoch 1", "newer process", "epoch 2")
    check(run, lambda run: run.zombie.send(run.alice.next_push()), "ABORTED", "old_epoch", words)


@pytest.mark.parametrize("call", [name for name in CALLS if name not in ("join", "upload")])
def test_who_has_not_joined(run: Run, call: str) -> None:
    words = ("'bob'",)
    check(run, lambda run: CALLS[call](run.bob()), "FAILED_PRECONDITION", "not_joined", words)


@pytest.mark.parametrize("call", [name for name in CALLS if name != "join"])
def test_another_run(run: Run, call: str) -> None:
    def act(run: Run) -> None:
        lost = run.as_alice(TOKENS["alice"])
        lost.id = pb.WorkerId(run="f00d", worker="alice", epoch=run.alice.id.epoch)
        CALLS[call](lost)

    check(run, act, "FAILED_PRECONDITION", "wrong_run", ("'f00d'", run.alice.id.run))


def test_who_holds_what_another_run_made(run: Run) -> None:
    def act(run: Run) -> None:
        lost = run.bob()
        lost.id.run = "f00d"
        lost.join()

    words = ("'bob' belongs to run 'f00d'", "its own server")
    check(run, act, "FAILED_PRECONDITION", "wrong_run", words)


def test_an_epoch_to_come(run: Run) -> None:
    def act(run: Run) -> None:
        early = run.as_alice(TOKENS["alice"])
        early.id = pb.WorkerId(run=run.alice.id.run, worker="alice", epoch=2**63)
        early.send(early.next_push())

    check(run, act, "FAILED_PRECONDITION", "not_joined", ("join again",))


@pytest.mark.parametrize(
    "name", ["", "a/b", "a b", "..\n", "ü", "x" * 65, "x" * 3_000_000, "\U0001f600" * 500_000]
)
def test_names_that_are_none(run: Run, name: str) -> None:
    def act(run: Run) -> None:
        Worker(name, run.place.channel(TOKENS["bob"])).join()

    check(run, act, "INVALID_ARGUMENT", "invalid", ("worker=", "expected 1 to 64"))


def test_a_replay_is_answered_again_and_not_applied(run: Run) -> None:
    before = run.place.status()
    push = run.applied[-1]
    answers = [run.alice.send(push) for _ in range(3)]
    after = run.place.status()
    assert (after.point, after.state_sha256) == (before.point, before.state_sha256)
    assert after.refused == before.refused
    for answer in answers:
        assert answer.applied is not None
        assert answer.applied.version == before.point.version
        assert answer.members == ("alice",)
    run.step()


def test_an_applied_number_with_other_bytes(run: Run) -> None:
    def act(run: Run) -> None:
        last = run.applied[-1]
        run.alice.send(replace(run.alice.push_of(gradients(99)), sequence=last.sequence))

    words = ("'alice'", "other contents", "expected the same bytes")
    check(run, act, "ALREADY_EXISTS", "digest_differs", words)


def test_a_fetch_of_nothing(run: Run) -> None:
    def act(run: Run) -> None:
        list(run.alice.stub.Fetch(pb.FetchRequest(id=run.alice.id), timeout=CALL_S))

    check(run, act, "INVALID_ARGUMENT", "invalid", ("which=0", "expected WORKERS or CENTRAL"))


# whose model


@pytest.mark.parametrize("case", other_models())
def test_another_model(run: Run, case: str) -> None:
    named, words = other_models()[case]
    check(run, lambda run: run.bob(named).join(), "FAILED_PRECONDITION", "model_differs", (words,))


@pytest.mark.parametrize("case", BAD_JOINS)
def test_a_join_that_is_none(run: Run, case: str) -> None:
    check(run, *BAD_JOINS[case])


# bytes that are no message


@pytest.mark.parametrize("method", ["Join", "Upload", "Step", "Fetch", "Renew", "Leave", "Status"])
def test_bytes_that_are_no_message(run: Run, method: str) -> None:
    def act(run: Run) -> None:
        call: Any = run.alice.channel.stream_stream(f"{SERVICE}/{method}")
        list(call(iter([b"\xff" * 100]), timeout=CALL_S))

    check(run, act, "INVALID_ARGUMENT", "damaged", (method,))


def test_an_upload_into_a_run_that_has_its_model_changes_nothing(run: Run) -> None:
    before = run.place.status()
    vectors = [bytes(raw.nbytes) for raw in run.alice.held.raw()]
    requests = codec.upload_requests(run.alice.id, [memoryview(vector) for vector in vectors])
    run.alice.stub.Upload(requests, timeout=CALL_S)
    after = run.place.status()
    assert (after.point, after.state_sha256) == (before.point, before.state_sha256)
    run.step()


def test_health_answers_whoever_got_through_the_handshake(run: Run) -> None:
    check_health: Any = run.place.channel(None).unary_unary("/grpc.health.v1.Health/Check")
    assert check_health(b"", timeout=CALL_S) == b"\x08\x01"


def test_damage_of_a_header_is_refused(run: Run) -> None:
    def act(run: Run) -> None:
        header = run.alice.header(run.alice.next_push())
        header.sequence += 1
        run.alice.stub.ShortStep(pb.ShortStepRequest(header=header), timeout=CALL_S)

    check(run, act, "INVALID_ARGUMENT", "damaged", ("header of push", "damaged on its way"))

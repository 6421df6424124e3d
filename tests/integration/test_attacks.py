"""Real attacks on a real `topq serve`: training goes on and ends in the bits of a run without.

What one stranger or one worker can do is tried for as long as the run lasts, bounded in number.
"""

from __future__ import annotations

import contextlib
import resource
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from integration.endings import central_parameters
from ps.attacked import (
    AGREED,
    ATTACKED,
    CALL_S,
    HELLO,
    STEPS,
    Silence,
    Target,
    connections,
    endless_header,
    pause,
    raw_worker,
    refusal,
    token_of,
    train,
)
from ps.certificates import Authority
from ps_raw import Kept, RawWorker
from served import Served

from topq_dist.ps.protocol.config import TrainingConfig
from topq_dist.ps.security.tls import ClientTls
from topq_dist.ps.state.snapshot_file import read_snapshot_file
from topq_dist.ps.state.state_dir import PREVIOUS_NAME, SNAPSHOT_NAME
from topq_dist.ps.wire import steps as wire
from topq_dist.v1 import parameter_server_pb2 as pb

TRAINING = TrainingConfig(
    inner_opt="adamw", options={"lr": 0.01, "weight_decay": 0.1}, downlink="topq", q=0.9
)
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
# one more than trains may join
WITH_ROOM = ("--min-workers", "2", "--max-workers", "3")
NUMEL = 8 * 16 + 16 + 16 * 4 + 4


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    with Target(tmp_path_factory.mktemp("undisturbed")) as target:
        return train(target)


@contextlib.contextmanager
def at(step: int, act: Callable[[], None]) -> Iterator[Callable[[int], None]]:
    """Yield what has `act` run before this step, and see that it was."""
    done: list[int] = []

    def between(now: int) -> None:
        if now == step:
            act()
            done.append(now)

    yield between
    assert done == [step]


class TestStrangers:
    """Whoever can reach the port, without token and certificate."""

    def test_silent_calls_take_no_workers_place(self, tmp_path: Path, undisturbed: str) -> None:
        tokens = tmp_path / "tokens"
        tokens.touch(0o600)
        tokens.write_text("".join(f"{name} {token_of(name)}\n" for name in ("w0", "w1")))
        with Target(tmp_path, ("--tokens", str(tokens)), tokens=True) as target:
            channel = grpc.insecure_channel(target.address)
            silences: list[Silence] = []
            methods = (HEALTH_CHECK, "/topq_dist.v1.ParameterServer/Status")

            def attack() -> None:
                silences.extend(Silence(channel, method, 200) for method in methods)

            try:
                with at(2, attack) as between:
                    assert train(target, between) == undisturbed
                assert target.status().refused["too_slow"] >= 100
            finally:
                for silence in silences:
                    silence.end()
                channel.close()

    def test_idle_connections_do_not_use_the_descriptors_up(
        self, tmp_path: Path, undisturbed: str
    ) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        target = Target(tmp_path, ("--lease-s", "30"))
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))  # which a shell hands on
            target.start()
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            # some say nothing, some greet and then say nothing
            with target, connections(target, min(3_000, hard - 500), b"", HELLO + AGREED) as idle:
                assert train(target) == undisturbed
                assert until(lambda: all(map(hung_up, idle[::50])), 45)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def test_headers_without_an_end_take_little_memory(
        self, tmp_path: Path, undisturbed: str
    ) -> None:
        with Target(tmp_path) as target:
            before_mb = target.memory_mb()
            # as far as gRPC lets a client go that has not agreed to the settings
            long = HELLO + endless_header(15 << 20, 14 << 20)
            agreed = HELLO + AGREED + endless_header(15 << 20, 14 << 20)
            with connections(target, 10, long) as held, connections(target, 30, agreed):
                assert train(target) == undisturbed
                assert until(lambda: all(map(hung_up, held)), 15)
                assert target.memory_mb() - before_mb < 10 * 20 + 150

    def test_without_a_certificate_they_say_no_header_at_all(
        self, tmp_path: Path, undisturbed: str
    ) -> None:
        ours = Authority(tmp_path / "ours")
        server, client = ours.issue("server", server=True), ours.issue("client", server=False)
        words = ["--tls-cert", str(server.certificate), "--tls-key", str(server.key)]
        words += ["--tls-client-ca", str(ours.certificate)]
        tls = ClientTls(ca=ours.certificate, certificate=client.certificate, key=client.key)
        with Target(tmp_path, words, tls=tls) as target:
            before_mb = target.memory_mb()
            with connections(target, 100, HELLO + endless_header(15 << 20, 14 << 20)) as held:
                assert train(target) == undisturbed
                assert all(map(hung_up, held))
            assert target.memory_mb() - before_mb < 150

    def test_a_limit_of_memory_and_a_restart_lose_nothing(
        self, tmp_path: Path, undisturbed: str
    ) -> None:
        with Target(tmp_path) as target:

            def attack() -> None:
                used = int(Path(f"/proc/{target.pid}/statm").read_text().split()[0])
                limit = used * resource.getpagesize() + (256 << 20)
                resource.prlimit(target.pid, resource.RLIMIT_AS, (limit, limit))
                long = HELLO + endless_header(15 << 20, 14 << 20)
                with contextlib.suppress(ConnectionError), connections(target, 60, long):
                    assert until(lambda: target.exit_code() is not None, 20)
                assert target.exit_code() != 0
                target.kill()  # and read what it said
                target.start()

            with at(ATTACKED, attack) as between:
                assert train(target, between) == undisturbed


class TestOneWorker:
    """A worker with a place in the run, or its token."""

    def test_poison_is_neither_made_a_version_nor_saved(
        self, tmp_path: Path, undisturbed: str
    ) -> None:
        with Target(tmp_path, (*WITH_ROOM, "--max-lr", "1e308")) as target:
            refusals: list[str] = []

            def mallory() -> None:
                worker = raw_worker(target, "mallory")
                worker.join()
                joined.set()
                for scale, lr in ((1.0, 1e300), (1e37, 9.0), (3e38, 0.01), (1.0, 1e39)):
                    push = poison(worker, scale)
                    refusals.append(refusal(lambda: send(worker, push, (lr,))))  # noqa: B023
                worker.stub.Leave(pb.LeaveRequest(id=worker.id), timeout=CALL_S)
                worker.close()

            joined = threading.Event()
            thread = threading.Thread(target=mallory)

            def attack() -> None:
                thread.start()
                assert joined.wait(CALL_S)

            with at(ATTACKED, attack) as between:
                assert train(target, between) == undisturbed
            thread.join(CALL_S)
            assert len(refusals) == 4
            for said in refusals:
                assert "INVALID_ARGUMENT" in said
                assert "not be finite" in said or "turns weights round" in said
            refused = target.status().refused
            assert (refused["non_finite"], refused["invalid"]) == (2, 2)
            assert target.served is not None
            assert target.served.stop()[0] == 0
            for name in (SNAPSHOT_NAME, PREVIOUS_NAME):
                saved = read_snapshot_file(target.state_dir / name)
                floats = [one for one in saved.values() if one.is_floating_point()]
                assert all(bool(torch.isfinite(one).all()) for one in floats)
            assert bool(torch.isfinite(central_parameters(target.state_dir, TRAINING)).all())

    def test_a_rate_has_a_bound(self, tmp_path: Path, undisturbed: str) -> None:
        with Target(tmp_path, WITH_ROOM) as target:

            def attack() -> None:
                worker = raw_worker(target, "mallory")
                worker.join()
                for lr in (1e300, 1001.0):
                    said = refusal(lambda: send(worker, poison(worker, 1.0), (lr,)))  # noqa: B023
                    assert f"lr={lr}: expected at most 1000" in said
                worker.stub.Leave(pb.LeaveRequest(id=worker.id), timeout=CALL_S)
                worker.close()

            with at(ATTACKED, attack) as between:
                assert train(target, between) == undisturbed

    def test_silence_with_a_lease_costs_one_rounds_time(
        self, tmp_path: Path, undisturbed: str
    ) -> None:
        over = threading.Event()
        with Target(tmp_path, (*WITH_ROOM, "--round-timeout-s", "4", "--lease-s", "6")) as target:

            def mallory() -> None:
                worker = raw_worker(target, "mallory")
                worker.join()
                joined.set()
                while not over.wait(0.5):
                    worker.stub.Renew(pb.RenewRequest(id=worker.id), timeout=CALL_S)
                worker.close()

            def look() -> None:
                seen.append(target.status())

            joined = threading.Event()
            seen: list[pb.StatusResponse] = []
            thread = threading.Thread(target=mallory)

            def attack() -> None:
                thread.start()
                assert joined.wait(CALL_S)

            try:
                with at(ATTACKED, attack) as between:
                    assert train(target, between, last=look) == undisturbed
                assert thread.is_alive()
                (status,) = seen
                lease = {one.worker: one.lease_left_s for one in status.workers}
                assert lease["mallory"] > 0
                assert status.round_workers == 2
            finally:
                over.set()
                thread.join(CALL_S)


class TestAfterARestart:
    """Lies of one that comes back to a server that was killed."""

    NAMES = ("a", "b", "mallory")

    def rounds(self, workers: list[RawWorker], steps: range, before: Any = None) -> None:
        """Have all push in each of these steps; `before` is called with mallory before hers."""

        def work(place: int, step: int) -> None:
            worker = workers[place]
            if before is not None and place == 2:
                before(worker)
            generator = torch.Generator().manual_seed(100 * step + place)
            answer = worker.step([torch.randn(NUMEL, generator=generator)])
            assert answer.members == self.NAMES

        for step in steps:
            threads = [threading.Thread(target=work, args=(place, step)) for place in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(CALL_S)
            assert {worker.point for worker in workers} == {workers[0].point}
            assert workers[0].point is not None
            assert workers[0].point.version == step + 1

    def ended(self, folder: Path, *, attacked: bool) -> tuple[str, dict[str, int]]:
        options = ("--min-workers", "3", "--max-workers", "3")
        with Target(folder, options) as target:
            workers = [raw_worker(target, name) for name in self.NAMES]
            for worker in workers:
                worker.join()
            self.rounds(workers, range(5))
            if attacked:
                target.kill()
                target.start()
                self.come_back(workers)
            self.rounds(workers, range(5, STEPS), lie if attacked else None)
            status = target.status()
            for worker in workers:
                worker.close()
            return status.state_sha256, dict(status.refused)

    @staticmethod
    def come_back(workers: list[RawWorker]) -> None:
        """Have mallory be back first, and say that she was alone in all that was lost."""
        mallory = workers[2]
        joined = mallory.join()
        # a snapshot may have been written after the last answer
        lost = [kept for kept in mallory.kept if kept.sequence >= joined.next_sequence]
        assert 0 < len(lost) < 5
        durable, first = 5 - len(lost), lost[0]
        push = poison(mallory, 2.0)
        alone = replace(push, sequence=first.sequence, base=first.base, members=("mallory",))
        answers: list[Any] = []
        lying = threading.Thread(
            target=lambda: answers.append(mallory.send(replace(alone, applied_version=durable + 1)))
        )
        lying.start()
        back = [threading.Thread(target=worker.come_back) for worker in workers[:2]]
        for thread in back:
            thread.start()
        lying.join(CALL_S)
        assert [answer.applied for answer in answers] == [None]
        mallory.come_back()
        for thread in back:
            thread.join(CALL_S)

    def test_a_replay_that_names_itself_alone_is_not_believed(self, tmp_path: Path) -> None:
        expected, _ = self.ended(tmp_path / "calm", attacked=False)
        found, refused = self.ended(tmp_path / "attacked", attacked=True)
        assert found == expected
        assert refused["unbelieved_replay"] >= 2 * (STEPS - 5)


class TestTheServersOwnTroubles:
    """A pause, a full disk, a lock that is gone: no attack, but as good as one."""

    def test_its_own_pause_is_nobodys_silence(self, tmp_path: Path) -> None:
        expected = self.ended(tmp_path / "calm", pauses=0)
        assert self.ended(tmp_path / "paused", pauses=1) == expected

    @staticmethod
    def ended(folder: Path, *, pauses: int) -> str:
        with Target(folder, ("--lease-s", "4")) as target:
            workers = [raw_worker(target, name) for name in ("w0", "w1")]
            for worker in workers:
                worker.join()
            for step in range(4):
                gradient = torch.full((NUMEL,), 0.1 * (step + 1))
                waits = threading.Thread(target=workers[0].step, args=([gradient],))
                waits.start()
                assert until(lambda: target.status().workers[0].waiting, 20)
                workers[1].stub.Renew(pb.RenewRequest(id=workers[1].id), timeout=CALL_S)
                if step < pauses:
                    pause(target, 6)
                    time.sleep(0.3)  # for the first to come to be alone
                assert workers[1].step([-3 * gradient]).members == ("w0", "w1")
                waits.join(CALL_S)
            status = target.status()
            for worker in workers:
                worker.close()
        assert status.point.version == 4
        return status.state_sha256

    def test_a_full_disk_bounds_what_workers_keep(self, tmp_path: Path, undisturbed: str) -> None:
        with Target(tmp_path) as target:
            stood: list[int] = []

            def empty_it_later() -> None:
                assert until(lambda: target.status().workers[1].waiting, 20)
                time.sleep(3)
                now = target.status()
                stood.append(now.point.version - now.durable_version)
                resource.prlimit(target.pid, resource.RLIMIT_FSIZE, (whole, whole))

            whole = resource.prlimit(0, resource.RLIMIT_FSIZE)[1]
            later = threading.Thread(target=empty_it_later)

            def fill() -> None:
                resource.prlimit(target.pid, resource.RLIMIT_FSIZE, (1000, whole))
                later.start()

            with at(3, fill) as between:

                def slowly(step: int) -> None:
                    between(step)
                    time.sleep(0.3)  # for a snapshot to fail

                assert train(target, slowly) == undisturbed
            later.join(CALL_S)
            assert stood == [4]  # twice the versions between snapshots

    def test_a_second_server_on_its_directory_and_no_lock(
        self, tmp_path: Path, undisturbed: str
    ) -> None:
        with Target(tmp_path) as target:

            def attack() -> None:
                first = target.served
                assert first is not None
                # while nothing is being saved
                assert until(lambda: target.status().durable_version == ATTACKED - 1, 20)
                (target.state_dir / "lock").unlink()
                second = target.start(port=0)
                ended.append((first, second))
                threading.Thread(target=hand_over).start()

            def hand_over() -> None:
                (first, second) = ended[0]
                assert until(lambda: first.exit_code is not None, 60)
                second.stop()
                target.start()

            ended: list[tuple[Served, Served]] = []
            with at(ATTACKED, attack) as between:
                assert train(target, between) == undisturbed
            code, _, said = ended[0][0].stop()
            assert code == 1
            assert "its lock file was removed meanwhile" in said

    def test_a_lock_that_is_removed_is_taken_again(self, tmp_path: Path, undisturbed: str) -> None:
        with Target(tmp_path) as target:
            with at(ATTACKED, (target.state_dir / "lock").unlink) as between:
                assert train(target, between) == undisturbed
            with pytest.raises(AssertionError, match="is in use by process"):
                Target(tmp_path).start()


def until(true: Callable[[], bool], limit_s: float) -> bool:
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        if true():
            return True
        time.sleep(0.05)
    return False


def hung_up(end: Any) -> bool:
    """Return whether the other side has closed a connection."""
    end.settimeout(0.01)
    try:
        while end.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


def poison(worker: RawWorker, scale: float) -> Kept:
    return worker.push_of([torch.full((NUMEL,), scale)])


def send(worker: RawWorker, push: Kept, lr: tuple[float, ...]) -> object:
    requests = wire.step_requests(worker.id, push.record(lr))
    return wire.read_answer(worker.stub.Step(requests, timeout=CALL_S), worker.spec)


def lie(mallory: RawWorker) -> None:
    """Say of other gradients that they were applied before, alone, now and far from now."""
    assert mallory.point is not None
    true, next_version = mallory.point, mallory.point.version + 1
    for version in (next_version, 10**6):
        # and that she holds what came of them
        mallory.point = replace(true, version=version)
        mallory.join()
        mallory.point = true
        push = poison(mallory, 3.0)
        claim = replace(push, applied_version=version, members=("mallory",))
        assert mallory.send(claim).applied is None

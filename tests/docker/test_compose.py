"""The compose file: two workers train digits over mutual TLS, whatever happens to the server.

Each ends with the parameters that the same training has without Docker.
"""

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from docker_engine import Project, inspect, run, wait_until

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1000)]

STEPS = 800
MAX_STOP_S = 8.0
WORKERS = ("worker-0", "worker-1")
SHA256 = re.compile(r"parameters sha256: ([0-9a-f]{64})")


@pytest.fixture(scope="session")
def expected_sha256(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the parameters that the training has without Docker."""
    said = run(
        *(sys.executable, "launch/compare.py", "--mode", "ps", "--topq-only"),
        *("--steps", STEPS, "--out", tmp_path_factory.mktemp("runs")),
        timeout_s=120.0,
    )
    (sha256,) = SHA256.findall(said)
    return str(sha256)


@pytest.fixture
def project(images: None, name: str, tmp_path: Path) -> Iterator[Project]:
    """The compose file with workers that take STEPS steps, not yet up."""
    override = tmp_path / "steps.yaml"
    commands = "".join(f'  {worker}: {{command: ["--steps", "{STEPS}"]}}\n' for worker in WORKERS)
    override.write_text(f'version: "3.8"\nservices:\n{commands}')
    project = Project(name, override)
    yield project
    project.compose("down", "--volumes", "--timeout", 1)


def sha256s(project: Project) -> list[str]:
    """Of the parameters that the workers end with."""
    return [sha256 for worker in WORKERS for sha256 in SHA256.findall(project.wait_exit(worker))]


def test_workers_train_to_the_parameters_that_they_have_without_docker(
    project: Project, expected_sha256: str
) -> None:
    project.compose("up", "--detach")
    project.wait_healthy("server")
    assert sha256s(project) == [expected_sha256] * 2
    assert version_of(project.container("server")) == STEPS


def test_stop_and_kill_of_the_server_lose_nothing(project: Project, expected_sha256: str) -> None:
    project.compose("up", "--detach")
    server = project.container("server")

    wait_for_version(server, STEPS // 6)
    begin_s = time.monotonic()
    run("docker", "stop", "--time", "60", server)
    stop_s = time.monotonic() - begin_s
    assert inspect(server, ".State.ExitCode") == 0, run("docker", "logs", server)
    assert stop_s < MAX_STOP_S
    run("docker", "start", server)

    for version in (STEPS // 3, STEPS // 2):
        wait_for_version(server, version)
        run("docker", "kill", server)
        run("docker", "start", server)

    assert sha256s(project) == [expected_sha256] * 2
    project.wait_healthy("server")
    assert version_of(server) == STEPS


def version_of(server: str) -> int:
    """Of the model, as `topq status` in the server's container has it; -1 while none answers."""
    try:
        status = run("docker", "exec", server, "topq", "status", "--json")
    except AssertionError:
        return -1
    return int(json.loads(status)["version"])


def wait_for_version(server: str, least: int) -> None:
    """Return once the server has got that far; fail where the training is over by then."""
    version = -1

    def reached() -> bool:
        nonlocal version
        version = version_of(server)
        return version >= least

    wait_until(reached, f"version {least}")
    assert version < STEPS, "it is too late to disturb the training: raise STEPS"

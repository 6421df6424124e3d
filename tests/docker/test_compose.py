"""The compose file: two workers train digits over mutual TLS, whatever happens to the server."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from docker_engine import ROOT, Project, inspect, run, wait_until

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1000)]

STEPS = 800
MAX_STOP_S = 8.0
# the reference computes beside it, and a local Ray in CI: a slow machine takes minutes
VERSION_LIMIT_S = 240.0
REFERENCE_LIMIT_S = 240.0
WORKERS = ("worker-0", "worker-1")
SHA256 = re.compile(r"parameters sha256: ([0-9a-f]{64})")


@pytest.fixture(scope="session")
def reference(
    engine: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[subprocess.Popen[str]]:
    """The same training without Docker, which goes on while the images are built."""
    command = [sys.executable, "launch/compare.py", "--mode", "ps", "--topq-only", "--link", "none"]
    command += ["--steps", str(STEPS), "--out", str(tmp_path_factory.mktemp("runs"))]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        yield process
        # it ends its own processes
        process.terminate()


@pytest.fixture
def project(images: None, name: str, tmp_path: Path) -> Iterator[Project]:
    """The compose file with workers that take STEPS steps, not yet up."""
    override = tmp_path / "steps.yaml"
    commands = "".join(f'  {worker}: {{command: ["--steps", "{STEPS}"]}}\n' for worker in WORKERS)
    override.write_text(f'version: "3.8"\nservices:\n{commands}')
    project = Project(name, override)
    yield project
    project.compose("down", "--volumes", "--timeout", 1)


def test_whatever_happens_to_the_server_workers_end_as_they_do_without_docker(
    reference: subprocess.Popen[str], project: Project
) -> None:
    project.compose("up", "--detach")
    project.wait_healthy("server")
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

    trained = [sha256 for worker in WORKERS for sha256 in SHA256.findall(project.wait_exit(worker))]
    project.wait_healthy("server")
    assert version_of(server) == STEPS
    said, _ = reference.communicate(timeout=REFERENCE_LIMIT_S)
    assert reference.returncode == 0, said
    assert trained == SHA256.findall(said) * 2
    assert len(trained) == 2


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

    wait_until(reached, f"version {least}", VERSION_LIMIT_S)
    assert version < STEPS, "it is too late to disturb the training: raise STEPS"

"""One engine and one build for all tests of a session; without an engine they are skipped."""

import uuid
from collections.abc import Iterator

import pytest
from docker_engine import Project, run, why_no_engine

BUILD_LIMIT_S = 900.0


@pytest.fixture(scope="session")
def engine() -> None:
    """A Docker engine that answers."""
    reason = why_no_engine()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def images(engine: None) -> None:
    """The images of docker/compose.yaml, built from this clone."""
    Project("topq").compose("build", timeout_s=BUILD_LIMIT_S)


@pytest.fixture
def name() -> str:
    """A name that nothing else in the engine has."""
    return f"topqtest{uuid.uuid4().hex[:12]}"


@pytest.fixture
def volume(images: None, name: str) -> Iterator[str]:
    """A volume of this test's own."""
    run("docker", "volume", "create", name)
    yield name
    run("docker", "volume", "rm", "--force", name)

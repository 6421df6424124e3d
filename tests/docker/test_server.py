"""A server in a container with as few rights as it needs: healthy, and gone soon when told."""

import time

import pytest
from docker_engine import CONFINED, inspect, run, wait_healthy

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1000)]

MAX_STOP_S = 5.0
SERVE = ("serve", "--address", "127.0.0.1:50051", "--inner-opt", "sgd", "--lr", "0.1")


def start(name: str) -> None:
    """Start SERVE as a container of that name, on the volume of that name."""
    often = ("--health-interval", "1s")
    run(
        *f"docker run --detach --name {name} --volume {name}:/state".split(),
        *often,
        *CONFINED,
        "topq",
        *SERVE,
    )


def test_server_gets_healthy_and_ends_with_0_within_seconds_of_sigterm(volume: str) -> None:
    start(volume)
    try:
        wait_healthy(volume)
        begin_s = time.monotonic()
        run("docker", "stop", "--time", "60", volume)
        stop_s = time.monotonic() - begin_s
        assert inspect(volume, ".State.ExitCode") == 0, run("docker", "logs", volume)
        assert stop_s < MAX_STOP_S
    finally:
        run("docker", "rm", "--force", volume)


def test_second_server_on_the_same_volume_ends_at_once_and_says_why(volume: str) -> None:
    start(volume)
    try:
        wait_healthy(volume)
        with pytest.raises(AssertionError, match=r"exit code [1-9]") as failure:
            run("docker", "run", "--rm", *CONFINED, "-v", f"{volume}:/state", "topq", *SERVE)
        assert "/state" in str(failure.value)
    finally:
        run("docker", "rm", "--force", volume)


@pytest.mark.usefixtures("images")
def test_image_serves_nobody_in_the_clear_unless_told() -> None:
    with pytest.raises(AssertionError, match="exit code 2") as failure:
        run("docker", "run", "--rm", *CONFINED, "topq", "serve", "--inner-opt", "sgd")
    assert "loopback" in str(failure.value)

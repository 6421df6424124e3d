"""A server in a container with as few rights as it needs: healthy, and gone soon when told."""

import time

import pytest
from docker_engine import CONFINED, inspect, run, wait_healthy

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1000)]

MAX_STOP_S = 5.0
SERVE = ("serve", "--address", "127.0.0.1:50051", "--inner-opt", "sgd", "--lr", "0.1")


def test_server_keeps_its_volume_for_itself_and_ends_with_0_within_seconds_of_sigterm(
    volume: str,
) -> None:
    mounted = ("--volume", f"{volume}:/state")
    often = ("--health-interval", "1s")
    run("docker", "run", "--detach", "--name", volume, *mounted, *often, *CONFINED, "topq", *SERVE)
    try:
        wait_healthy(volume)
        with pytest.raises(AssertionError, match=r"exit code [1-9]") as failure:
            run("docker", "run", "--rm", *CONFINED, *mounted, "topq", *SERVE)
        assert "/state" in str(failure.value)

        begin_s = time.monotonic()
        run("docker", "stop", "--time", "60", volume)
        stop_s = time.monotonic() - begin_s
        assert inspect(volume, ".State.ExitCode") == 0, run("docker", "logs", volume)
        assert stop_s < MAX_STOP_S
    finally:
        run("docker", "rm", "--force", volume)


@pytest.mark.usefixtures("images")
def test_image_serves_nobody_in_the_clear_unless_told() -> None:
    with pytest.raises(AssertionError, match="exit code 2") as failure:
        run("docker", "run", "--rm", *CONFINED, "topq", "serve", "--inner-opt", "sgd")
    assert "loopback" in str(failure.value)

"""Docker as the tests use it: its commands, and the compose file under a name of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFINED = (
    *("--read-only", "--cap-drop", "ALL"),
    *("--security-opt", "no-new-privileges", "--memory", "1g"),
)


def run(*command: object, timeout_s: float = 60.0) -> str:
    """Return what `command`, run in the clone, printed on both streams.

    Fails with it where the exit code is not 0.
    """
    done = subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        # an engine whose containers have no way out can still build
        env={**os.environ, "TOPQ_BUILD_NETWORK": "host"},
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout[-6000:]}"
    return done.stdout.strip()


def inspect(name: str, part: str) -> Any:
    """Return what `docker inspect` has for an image or a container under e.g. ".State"."""
    return json.loads(run("docker", "inspect", "--format", f"{{{{json {part}}}}}", name))


@cache
def why_no_engine() -> str | None:
    """Return why there is no Docker to test with, or None."""
    if shutil.which("docker") is None:
        return "there is no docker command"
    if not _works("docker", "version"):
        return "no Docker engine answers"
    return None if compose_command() else "there is no docker compose command"


@cache
def compose_command() -> tuple[str, ...]:
    """Return the words that start Docker's compose, or its predecessor; () for neither."""
    words = (("docker", "compose"), ("docker-compose",))
    return next((command for command in words if _works(*command, "version")), ())


def _works(*command: str) -> bool:
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run(command, capture_output=True, timeout=20.0, check=False).returncode == 0


def wait_until(holds: Callable[[], bool], what: str, deadline_s: float = 90.0) -> None:
    """Return once `holds()`; fail after deadline_s."""
    end_s = time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < end_s, f"not within {deadline_s:g} s: {what}"
        time.sleep(0.1)


class Project:
    """docker/compose.yaml under a name of its own; `override` is a second file laid over it."""

    def __init__(self, name: str, override: Path | None = None) -> None:
        self._name = name
        files = [ROOT / "docker" / "compose.yaml", *([override] if override else [])]
        self._command = (*compose_command(), "-p", name, *(w for f in files for w in ("-f", f)))

    def compose(self, *words: object, timeout_s: float = 120.0) -> str:
        """Run compose's command `words` and return what it printed."""
        return run(*self._command, *words, timeout_s=timeout_s)

    def container(self, service: str) -> str:
        """Return the id of a service's container, running or not."""
        label = "label=com.docker.compose"
        name = run(
            *("docker", "ps", "--all", "--quiet"),
            *("--filter", f"{label}.project={self._name}"),
            *("--filter", f"{label}.service={service}"),
        )
        assert name, f"{service} has no container"
        return name

    def wait_healthy(self, service: str) -> None:
        """Return once a service's container is healthy."""
        wait_healthy(self.container(service))

    def wait_exit(self, service: str, deadline_s: float = 120.0) -> str:
        """Return the log of a service that ends, with exit code 0, within deadline_s."""
        name = self.container(service)
        wait_until(
            lambda: inspect(name, ".State.Status") == "exited", f"{service} ends", deadline_s
        )
        log = run("docker", "logs", name)
        assert inspect(name, ".State.ExitCode") == 0, log
        return log


def wait_healthy(container: str) -> None:
    """Return once a container's health check holds; fail at once where the container ends."""

    def healthy() -> bool:
        state = inspect(container, ".State")
        assert state["Status"] == "running", run("docker", "logs", container)
        return bool(state["Health"]["Status"] == "healthy")

    wait_until(healthy, f"{container} is healthy")

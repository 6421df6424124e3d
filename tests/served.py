"""`topq serve` as a process of its own, as people run it."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from leak_report import without_leak_report

TOPQ = [sys.executable, "-m", "topq_dist.cli"]
START_S = 60


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Return this process's variables without ours, and `extra`."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("TOPQ_")}
    return ours | dict(extra)


class Served:
    """A `topq serve` process that listens; `stop` ends it with SIGTERM."""

    def __init__(self, *words: str, **variables: str) -> None:
        self._process = subprocess.Popen(
            [*TOPQ, "serve", *words],
            env=environment(variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], START_S)
        said = self._process.stdout.readline() if readable else ""
        match = re.fullmatch(r"listening on (\S+)\n", said)
        if match is None:
            raise AssertionError((said, *self.kill()))
        self.address = match[1]

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    def line(self) -> str:
        """Return the next line on stdout, which must be under way."""
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        if self._process.poll() is None:
            self._process.send_signal(number)
        try:
            said, errors = self._process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return self._process.returncode, said, without_leak_report(errors)

    def kill(self) -> tuple[str, str]:
        self._process.kill()
        return self._process.communicate()


@contextmanager
def serving(*words: str, **variables: str) -> Iterator[Served]:
    served = Served(*words, **variables)
    try:
        yield served
    finally:
        served.kill()

"""`topq serve` as a process of its own, with the words and variables that people give it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from forked_process import ForkedProcess, Place
from leak_report import without_leak_report

TOPQ = [sys.executable, "-m", "topq_dist.cli"]
START_S = 60
_END_S = 30


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Return this process's variables without ours, and `extra`."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("TOPQ_")}
    return ours | dict(extra)


class Served:
    """A `topq serve` process that listens; `stop` ends it with SIGTERM."""

    def __init__(self, *words: str, **variables: str) -> None:
        self._read = 0
        self._process = ForkedProcess(_serve, *words, place=Place(variables=environment(variables)))
        said = self.line()
        if not said.startswith("listening on ") or not said.endswith("\n"):
            raise AssertionError((said, *self.kill()))
        self.address = said.removeprefix("listening on ").rstrip("\n")

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code; None while the process runs."""
        return self._process.exit_code

    def line(self) -> str:
        """Return the next line on stdout, which must be under way; what there is where it ended."""
        deadline_s = time.monotonic() + START_S
        while time.monotonic() < deadline_s:
            ended = self.exit_code is not None
            line = self._rest().partition("\n")
            if line[1] or ended:
                self._read += len("".join(line[:2]))
                return "".join(line[:2])
            time.sleep(0.005)
        raise AssertionError((f"no line on stdout within {START_S} s", *self.kill()))

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        if self.exit_code is None:
            os.kill(self.pid, number)
        code = self._process.wait(_END_S)
        return code, self._rest(), without_leak_report(self._process.errors)

    def kill(self) -> tuple[str, str]:
        self._process.kill()
        return self._rest(), self._process.errors

    def _rest(self) -> str:
        return self._process.output[self._read :]


def _serve(*words: str) -> int:
    from topq_dist.cli import main

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.argv = ["topq", "serve", *words]
    return main(["serve", *words])


@contextmanager
def serving(*words: str, **variables: str) -> Iterator[Served]:
    served = Served(*words, **variables)
    try:
        yield served
    finally:
        served.kill()

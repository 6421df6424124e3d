"""`topq serve` as a process of its own, with the words and variables that people give it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from forked import FORKED
from leak_report import without_leak_report

TOPQ = [sys.executable, "-m", "topq_dist.cli"]
START_S = 60
_END_S = 30


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Return this process's variables without ours, and `extra`."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("TOPQ_")}
    return ours | dict(extra)


class Served:
    """A `topq serve` process that listens; `stop` ends it with SIGTERM.

    It is forked from one that has torch already, which saves seconds of each start.
    """

    def __init__(self, *words: str, **variables: str) -> None:
        self._read = 0
        with tempfile.TemporaryDirectory(prefix="topq-served-") as folder:
            streams = Path(folder) / "stdout", Path(folder) / "stderr"
            # numbers, which nobody has to close, of files that are gone once they are
            self._output, self._errors = (
                os.open(path, os.O_RDONLY | os.O_CREAT, 0o600) for path in streams
            )
            self._process = FORKED.Process(
                target=_serve, args=(words, environment(variables), Path.cwd(), *streams)
            )
            self._process.daemon = True
            self._process.start()
            said = self.line()
        if not said.startswith("listening on ") or not said.endswith("\n"):
            raise AssertionError((said, *self.kill()))
        self.address = said.removeprefix("listening on ").rstrip("\n")

    @property
    def pid(self) -> int:
        """The number of the process."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """What the process has ended with; None while it runs."""
        return self._process.exitcode

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
        self._process.join(_END_S)
        code = self.exit_code
        if code is None:
            raise AssertionError(("it has not ended", *self.kill()))
        return code, self._rest(), without_leak_report(_text(self._errors))

    def kill(self) -> tuple[str, str]:
        self._process.kill()
        self._process.join(_END_S)
        return self._rest(), _text(self._errors)

    def _rest(self) -> str:
        return _text(self._output)[self._read :]


def _text(file: int) -> str:
    return os.pread(file, 1 << 24, 0).decode()


def _serve(
    words: Sequence[str],
    variables: Mapping[str, str],
    folder: Path,
    output: Path,
    errors: Path,
) -> None:
    from topq_dist.cli import main

    for number, path in enumerate((output, errors), start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    # a daemon is ended with its parent, but may have no processes of its own
    multiprocessing.current_process().daemon = False
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(int(variables.get("OMP_NUM_THREADS", torch.get_num_threads())))
    sys.argv = ["topq", "serve", *words]
    code = 1
    try:
        code = main(["serve", *words])
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def serving(*words: str, **variables: str) -> Iterator[Served]:
    served = Served(*words, **variables)
    try:
        yield served
    finally:
        served.kill()

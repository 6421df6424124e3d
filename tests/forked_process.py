"""Processes in the place of subprocess.Popen's that have torch already: seconds a start less."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from forked import FORKED

_END_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Place:
    """The place of a process.

    variables: all that it has, this process's by default. folder: the present one by default.
    leads: whether it leads a session and a process group of its own, as from a shell.
    """

    variables: Mapping[str, str] | None = None
    folder: Path | None = None
    leads: bool = False


class ForkedProcess:
    """A call in a process of its own, which ends with what the call returns or exits with.

    It ends with this process, at the latest.
    """

    def __init__(
        self, call: Callable[..., Any], *arguments: Any, place: Place | None = None
    ) -> None:
        place = place or Place()
        variables = dict(os.environ if place.variables is None else place.variables)
        with tempfile.TemporaryDirectory(prefix="topq-forked-") as folder:
            streams = Path(folder) / "stdout", Path(folder) / "stderr"
            # numbers, which nobody has to close
            self._output, self._errors = (
                os.open(path, os.O_RDONLY | os.O_CREAT, 0o600) for path in streams
            )
            started = Path(folder) / "started"
            self._process = FORKED.Process(
                target=_main,
                args=(
                    *(call, arguments, variables, place.folder or Path.cwd(), place.leads),
                    *(streams, started),
                ),
                daemon=True,
            )
            self._process.start()
            # the files are gone then
            while not started.exists() and self.exit_code is None:
                time.sleep(0.002)
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code, less than zero for a signal; None while it runs."""
        return self._process.exitcode

    @property
    def output(self) -> str:
        """All that it has written to stdout so far."""
        return os.pread(self._output, 1 << 24, 0).decode()

    @property
    def errors(self) -> str:
        """All that it has written to stderr so far."""
        return os.pread(self._errors, 1 << 24, 0).decode()

    def wait(self, timeout_s: float) -> int:
        """Return what it has ended with; where it does not, kill it and raise AssertionError."""
        self._process.join(timeout_s)
        if self.exit_code is None:
            self.kill()
            raise AssertionError((f"no end within {timeout_s} s", self.output, self.errors))
        return self.exit_code

    def kill(self) -> None:
        """End it as kill -9 does."""
        self._process.kill()
        self._process.join(_END_S)


def run_script(path: Path, *words: str) -> None:
    """Run a script as Python itself would, on one thread."""
    torch.set_num_threads(1)
    sys.argv = [str(path), *words]
    # the folder of the script comes first
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def _main(
    call: Callable[..., Any],
    arguments: tuple[Any, ...],
    variables: Mapping[str, str],
    folder: Path,
    leads: bool,
    streams: tuple[Path, Path],
    started: Path,
) -> None:
    # a daemon is ended with its parent, but may have no processes of its own
    multiprocessing.current_process().daemon = False
    if leads:
        os.setsid()
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    started.touch()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    code: Any = 1
    try:
        code = call(*arguments)
    except SystemExit as exit_:
        code = exit_.code
    except BaseException:  # noqa: BLE001 - as Python ends on one
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # in Python's shutdown torch's gloo threads abort one process in a hundred
    os._exit(code if isinstance(code, int) else int(code is not None))

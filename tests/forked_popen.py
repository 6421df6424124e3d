"""subprocess.Popen of Python's scripts and modules, forked from a process that has torch already.

What they do, how they end and what a signal does to them is as ever; but torch is not imported
again, which takes seconds of a core each. `words_of` says what they were started with, since /proc
shows the words of the process that they are a fork of.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

_WORDS = Path(tempfile.gettempdir()) / f"topq-forked-words-{os.getuid()}"


def fork_popen() -> None:
    """Have this process, which should have no threads, fork what it would start with Python."""
    subprocess.Popen = _ForkingPopen  # type: ignore[misc]
    vars(subprocess_handler)["Popen"] = _ForkingPopen


def words_of(process: int) -> str:
    """Return the words that a live process was started with; "" where there is none."""
    try:
        plain = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
        note = _note_of(process)
    except OSError:
        return ""
    # of one that has ended, and is not waited for yet, there are no words
    return note.read_text() if plain and note.exists() else plain


def _note_of(process: int) -> Path:
    # numbers are given again, but not at the same time
    stat = Path(f"/proc/{process}/stat").read_text()
    return _WORDS / f"{process}.{stat.rpartition(')')[2].split()[19]}"


class _ForkingPopen(subprocess.Popen[Any]):
    def _execute_child(
        self,
        args: Any,
        executable: Any,
        preexec_fn: Any,
        close_fds: bool,
        pass_fds: Sequence[int],
        cwd: Any,
        env: Mapping[str, str] | None,
        startupinfo: Any,
        creationflags: Any,
        shell: bool,
        *rest: Any,
    ) -> None:
        words = [] if shell or isinstance(args, str | bytes) else [os.fsdecode(one) for one in args]
        if not words or words[0] != sys.executable:
            before = args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo
            super()._execute_child(*before, creationflags, shell, *rest)  # type: ignore[misc]
            return
        streams, leads = rest[:6], rest[11]
        sys.stdout.flush()
        sys.stderr.flush()
        ready, begun = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            _take_up(streams[0], streams[3], streams[5])
            if leads:
                os.setsid()
            if cwd is not None:
                os.chdir(cwd)
            if env is not None:
                os.environ.clear()
                os.environ.update(env)
            if preexec_fn is not None:
                preexec_fn()
            _WORDS.mkdir(exist_ok=True)
            _note_of(os.getpid()).write_text(" ".join(words))
            os.write(begun, b".")
            os.closerange(3, min(os.sysconf("SC_OPEN_MAX"), 65_536))
            _be(words[1:])
        self._child_created = True
        self._close_pipe_fds(*streams)  # type: ignore[attr-defined]
        os.close(begun)
        # what is told to end before it has begun would be this process once more
        os.read(ready, 1)
        os.close(ready)


def _take_up(*streams: int) -> None:
    """Be at the other end of these streams, -1 for this process's own, as if just begun."""
    for number, stream in enumerate(streams):
        if stream == number:
            os.set_inheritable(number, True)
        elif stream != -1:
            os.dup2(stream, number)
    signal.set_wakeup_fd(-1)
    for one in signal.valid_signals():
        if callable(signal.getsignal(one)) and one != signal.SIGINT:
            signal.signal(one, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _be(words: list[str]) -> None:
    """Run a script or a module as Python would, and end."""
    if words[0] == "-u":
        words = words[1:]
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    code: Any = 1
    try:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path[0] = str(Path.cwd())
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path[0] = str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as exit_:
        code = exit_.code or 0
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
            code = 1
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:  # noqa: BLE001 - as Python ends on one
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

"""Runs of launch/compare.py as processes of their own, for the tests of the main job."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from forked_popen import fork_popen, words_of
from forked_process import ForkedProcess, Place, run_script
from leak_report import without_leak_report

COMPARE = Path(__file__).resolve().parents[1] / "launch" / "compare.py"
DEADLINE_S = 100.0


def start(*arguments: object) -> ForkedProcess:
    """Start compare.py as the leader of a process group of its own, as a shell would.

    Without an emulated link, unless one is asked for.
    """
    if "--link" not in arguments:
        arguments = (*arguments, "--link", "none")
    return ForkedProcess(_compare, *map(str, arguments), place=Place(leads=True))


def _compare(*words: str) -> None:
    fork_popen()
    run_script(COMPARE, *words)


def finish(process: ForkedProcess) -> tuple[int, str, str]:
    """Return (exit code, stdout, stderr) once the process has ended."""
    code = process.wait(DEADLINE_S)
    return code, process.output, without_leak_report(process.errors)


def wait_for(path: Path, process: ForkedProcess) -> None:
    """Return as soon as `path` is there; fail where the process ends before."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not path.exists():
        assert process.exit_code is None, (process.output, process.errors)
        assert time.monotonic() < deadline_s, f"{path} did not appear"
        time.sleep(0.02)


def processes_with(text: str) -> list[int]:
    """Return the ids of the live processes of which the words hold `text`."""
    processes = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return [process for process in processes if text in words_of(process)]


def ranks_below(process: ForkedProcess) -> list[int]:
    """Return the process ids of the ranks, in the order of their start."""
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    return sorted(int(pid) for file in children for pid in file.read_text().split())


def results(out: Path) -> dict[str, dict[str, Any]]:
    """Return the result of each mode that the JSON files in `out` hold."""
    read = [json.loads(path.read_bytes()) for path in sorted(out.glob("*.json"))]
    return {result["mode"]: result for result in read}

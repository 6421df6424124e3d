"""Words that only this project used, and the field's own that took their place; docstrings."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("topq_dist", "launch", "benchmarks", "tests", "docs", "docker", "protos")
SUFFIXES = {".py", ".md", ".sh", ".proto", ".yaml"}

# old names, of classes, functions and modules, and what stands in their place
GONE = {
    "crew Crew CrewError": "worker_pool",
    "load_peers": "load_baselines",
    "ps_endings": "errors",
    "ps.asking ps.reach": "probe",
    "KeptPush KeptPushes": "PushRecord, ReplayLog",
    "Ticket": "PendingPush",
    "Admission door": "Membership",
    "Situation SyncRule": "RoundView, SyncPolicy",
    "Caller": "WorkerId",
    "History Touched": "UpdateLog, SparseDelta",
    "Durability": "Snapshotter",
    "Patience PATIENCE": "RetryDeadline",
    "Gate Patrol Pace": "AuthInterceptor, CallWatchdog, ThroughputLimit",
    "Buffers lend": "BufferPool",
    "Stumble stumble stumbled": "recover_from",
    "start_over": "resync_from",
    "break_off": "cancel_calls",
    "ByLayout by_layout": "LayoutCache",
    "owes forgive forgiven": "residual, clear_residuals",
    "settle settles settled settling": "update_residual",
    "Cut( CutSelector uniform_cuts cuts": "Segment, SegmentSelector",
    "kept_count": "k_from_q",
    "Pieces(": "ChunkedVector",
    "Parts deal_out gather_back": "BlockCyclicPartition",
    "TakenUp taking_up": "UndoLog, accumulate_and_select",
    "Density": "SparsityPolicy",
    "Link": "CommContext",
    "Pending Gathering Splitting Reducing": "ExchangeWork, AllGatherWork, SplitReduceWork",
    "FrameGather FrameSwap KeptBuffer": "FrameAllGather, FrameAllToAll, ReusableBuffer",
}
# rooms whose docstrings begin with a noun, the thing, or a verb, what it does
WITH_DOCSTRINGS = (
    "launch",
    "benchmarks/harness",
    "topq_dist/ps",
    "tests",
)


def texts() -> dict[Path, str]:
    """Return every page and source file but this one and the history of changes."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    files += [page for page in ROOT.glob("*.md") if page.name != "CHANGELOG.md"]
    return {
        path: path.read_text()
        for path in files
        if path.suffix in SUFFIXES and path.is_file() and path != Path(__file__).resolve()
    }


@pytest.fixture(scope="module")
def sources() -> dict[Path, str]:
    return texts()


@pytest.mark.parametrize(("old", "new"), GONE.items())
def test_the_word_is_gone(old: str, new: str, sources: dict[Path, str]) -> None:
    words = "|".join(map(re.escape, old.split()))
    # also within a longer name that is written with underscores
    word = re.compile(rf"(?<![A-Za-z0-9])({words})(?![A-Za-z0-9])")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path, text in sources.items()
        if word.search(text)
        for number, line in enumerate(text.splitlines(), start=1)
        if word.search(line)
    ]
    assert found == [], f"{old} is now {new}"


def test_docstrings_begin_with_the_thing(sources: dict[Path, str]) -> None:
    rooms = tuple(ROOT / room for room in WITH_DOCSTRINGS)
    found = [
        f"{path.relative_to(ROOT)}: {docstring.splitlines()[0]}"
        for path, text in sources.items()
        if path.suffix == ".py" and any(path.is_relative_to(room) for room in rooms)
        for docstring in docstrings(text)
        if docstring.startswith(("Who ", "What ", "Where "))
    ]
    assert found == []


def docstrings(text: str) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    return [docstring for node in nodes if (docstring := ast.get_docstring(node))]


def test_something_is_read(sources: dict[Path, str]) -> None:
    names = {path.name for path in sources}
    assert {"README.md", "compressor.py", "train.sh", "parameter_server.proto"} <= names
    assert docstrings(Path(__file__).read_text())

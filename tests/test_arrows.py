"""Import directions: that the contracts of pyproject.toml hold, and what they cannot say."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import topq_dist

PACKAGE = Path(topq_dist.__file__).parent
# an import that turns an arrow round: the room that must not have it, and what it would import
TURNED = [
    ("compress", "topq_dist.ddp"),
    ("compress", "topq_dist.exchange"),
    ("compress", "topq_dist.optim"),
    ("compress/kernels", "topq_dist.compress.codec"),
    ("compress/sparsify", "topq_dist.compress.codec"),
    ("compress/codec", "topq_dist.compress.partition"),
    ("compress/codec", "topq_dist.compress.residual"),
    ("exchange", "topq_dist.ddp"),
    ("exchange", "topq_dist.local"),
    ("local", "topq_dist.ddp"),
    ("local", "topq_dist.hook"),
    ("ddp", "topq_dist.local"),
    ("exchange", "topq_dist.optim"),
    ("exchange", "topq_dist.hook"),
    ("hook", "topq_dist.ddp"),
    ("hook", "topq_dist.fsdp"),
    ("fsdp", "topq_dist.ddp"),
    ("optim", "topq_dist.compress"),
    ("compress", "topq_dist.ps"),
    ("ddp", "topq_dist.ps"),
    ("ps/client", "topq_dist.exchange"),
    ("ps/client", "topq_dist.ps.server"),
    ("ps/server", "topq_dist.ps.client"),
    ("ps/state", "topq_dist.ps.server"),
    ("ps/training", "topq_dist.ps.state"),
    ("ps/wire", "topq_dist.ps.training"),
    ("ps/model", "topq_dist.ps.wire"),
    ("ps/security", "topq_dist.ps.model"),
    ("ps/protocol", "topq_dist.ps.model"),
    ("ps/training", "grpc"),
    ("ddp", "topq_dist.integrations"),
    ("telemetry", "ray"),
]


def broken_contracts(root: Path) -> str:
    """Return what import-linter says of the package in `root`; empty where all contracts hold."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command as run; run()",
            "--no-cache",
        ],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(PACKAGE, root / "topq_dist", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PACKAGE.parent / "pyproject.toml", root)
    return root


def test_the_contracts_hold(copy: Path) -> None:
    assert broken_contracts(copy) == ""


@pytest.mark.parametrize(("room", "imported"), TURNED)
def test_an_arrow_that_is_turned_round_is_noticed(copy: Path, room: str, imported: str) -> None:
    turned = copy / "topq_dist" / room / "turned.py"
    turned.write_text(f"import {imported}\n")
    try:
        said = broken_contracts(copy)
    finally:
        turned.unlink()
    assert f"topq_dist.{room.replace('/', '.')}.turned" in said
    assert imported in said


def imports_of(source: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def test_the_engine_knows_no_process_group() -> None:
    rooms = {"advice", "ddp", "elastic", "exchange", "fsdp", "hook", "local"}
    transports = {"__init__.py", "register.py", *rooms}
    sources = [
        source
        for source in PACKAGE.rglob("*.py")
        if source.relative_to(PACKAGE).parts[0] not in transports
    ]
    assert PACKAGE / "compress" / "compressor.py" in sources
    for source in sources:
        assert not {name for name in imports_of(source) if name.startswith("torch.distributed")}


def test_an_exchange_knows_no_wrapper_of_models() -> None:
    sources = list((PACKAGE / "exchange").glob("*.py"))
    assert PACKAGE / "exchange" / "allgather.py" in sources
    for source in sources:
        assert not {name for name in imports_of(source) if name.startswith("torch.nn")}


def test_what_top_q_means_imports_nothing_of_ours() -> None:
    may_import = {"sparsity.py": set(), "partition_topk.py": {"topq_dist.dtypes"}}
    for source, allowed in may_import.items():
        ours = {name for name in imports_of(PACKAGE / source) if name.startswith("topq_dist")}
        assert {name for name in ours if not any(name.startswith(one) for one in allowed)} == set()


def test_every_room_has_its_tests() -> None:
    tests = Path(__file__).parent
    rooms = {found.parent.relative_to(PACKAGE) for found in PACKAGE.rglob("*/__init__.py")}
    assert Path("ps/server") in rooms
    for room in rooms:
        assert list((tests / room).rglob("test_*.py")), room

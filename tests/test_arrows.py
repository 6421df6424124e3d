"""Import directions that a layer contract cannot say: submodules of other packages."""

from __future__ import annotations

import ast
from pathlib import Path

import topq_dist

PACKAGE = Path(topq_dist.__file__).parent


def imports_of(source: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def test_the_engine_knows_no_process_group() -> None:
    transports = {"__init__.py", "ddp"}
    sources = [
        source
        for source in PACKAGE.rglob("*.py")
        if source.relative_to(PACKAGE).parts[0] not in transports
    ]
    assert PACKAGE / "compress" / "compressor.py" in sources
    for source in sources:
        assert not {name for name in imports_of(source) if name.startswith("torch.distributed")}


def test_what_top_q_means_imports_nothing_of_ours() -> None:
    for source in ("topq.py", "top_k.py"):
        assert not {name for name in imports_of(PACKAGE / source) if name.startswith("topq_dist")}


def test_every_room_has_its_tests() -> None:
    tests = Path(__file__).parent
    rooms = [folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()]
    for room in rooms:
        assert list((tests / room).glob("test_*.py")), room

"""The modules beside the training scripts: which of them import which."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

TRAINING = Path(__file__).resolve().parents[2] / "launch" / "training"


def imported(source: Path) -> set[str]:
    """Return the neighbours that a module imports, at its top or later."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "training":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            package, _, module = node.module.partition(".")
            if package == "training":
                found.add(module)
    return found


def test_there_is_no_circle() -> None:
    imports = {source.stem: imported(source) for source in TRAINING.glob("*.py")}
    assert "models" in imports["options"]
    # raises CycleError, which names the circle
    TopologicalSorter(imports).prepare()

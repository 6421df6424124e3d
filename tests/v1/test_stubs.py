"""The generated stubs are what the contract generates."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
STUBS = "topq_dist/v1"


def test_the_stubs_have_not_drifted_from_the_contract(tmp_path: Path) -> None:
    subprocess.run([ROOT / "protos" / "generate.sh", tmp_path], check=True)
    made = {path.name: path.read_text() for path in (tmp_path / STUBS).iterdir()}
    assert len(made) == 4
    for name, text in made.items():
        assert (ROOT / STUBS / name).read_text() == text, f"run protos/generate.sh: {name}"

"""launch/setup.sh: what it installs and when, with a stand-in for Python."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNEL = "topq_dist/compress/native/kernel.c"
BASH = shutil.which("bash") or "/bin/bash"

STAND_IN = """#!/bin/sh
echo "$*" >>"$LOG"
case "$*" in *version_info*) exit "${OLD:-0}";; *ensurepip*) exit "${NO_VENV:-0}";; esac
case "$*" in --version) echo "Python 3.9.1";; esac
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python";;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout in which `python` is the stand-in, and only installs what it is told to."""
    root = tmp_path / "a checkout"
    (root / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "setup.sh", root / "launch")
    (root / "build_hooks").mkdir()
    (root / "topq_dist" / "compress" / "native").mkdir(parents=True)
    (root / "build_hooks" / "hatch_build.py").touch()
    (root / KERNEL).touch()
    (root / "pyproject.toml").write_text("[project]\n")
    (root / "constraints.txt").write_text("torch==2.13.0\n")
    stand_in = root / "stand-in"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    return root


def set_up(root: Path, extras: str, **environment: str) -> tuple[int, list[str], str]:
    """Return (exit code, the pip installs it ran, stderr) of `set_up EXTRAS`."""
    log = root / "log"
    log.write_text("")
    done = subprocess.run(
        [BASH, "-c", f"set -euo pipefail; source launch/setup.sh; set_up {extras}"],
        cwd=root,
        env={
            "PATH": "/usr/bin:/bin",
            "PYTHON": str(root / "stand-in"),
            "LOG": str(log),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    installs = [line for line in log.read_text().splitlines() if "pip install" in line]
    return done.returncode, installs, done.stderr


def test_installs_once(checkout: Path) -> None:
    code, installs, said = set_up(checkout, "train")
    assert code == 0
    assert len(installs) == 1
    assert f"-c {checkout}/constraints.txt -e {checkout}[train]" in installs[0]
    assert len(said.splitlines()) == 2
    assert set_up(checkout, "train") == (0, [], "")


def test_installs_again_for_what_changed(checkout: Path) -> None:
    set_up(checkout, "train")
    assert f"{checkout}[train,test]" in set_up(checkout, "train test")[1][0]
    assert set_up(checkout, "train")[1] == []
    (checkout / "constraints.txt").write_text("torch==2.14.0\n")
    assert len(set_up(checkout, "train")[1]) == 1
    assert len(set_up(checkout, "train test")[1]) == 1
    (checkout / KERNEL).write_text("int kernel;\n")
    assert len(set_up(checkout, "train")[1]) == 1
    assert len(set_up(checkout, "train", TOPQ_NATIVE="0")[1]) == 1
    moved = checkout.rename(checkout.with_name("moved"))
    assert len(set_up(moved, "train")[1]) == 1


def test_says_what_compiles_the_kernels_before_it_installs(checkout: Path) -> None:
    set_up(checkout, "train")
    ran = (checkout / "log").read_text().splitlines()
    describing = f"{checkout}/build_hooks/compile_kernels.py --describe"
    assert 0 <= ran.index(describing) < next(at for at, r in enumerate(ran) if "pip install" in r)


def test_an_install_that_failed_is_tried_again(checkout: Path) -> None:
    stand_in = checkout / "stand-in"
    stand_in.write_text(STAND_IN + 'case "$*" in *"pip install"*) exit "${FAIL:-0}";; esac\n')
    assert set_up(checkout, "train", FAIL="1")[0] == 1
    code, installs, _ = set_up(checkout, "train")
    assert (code, len(installs)) == (0, 1)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PYTHON": "/absent/python"}, "/absent/python: not found: expected Python 3.11"),
        ({"OLD": "1"}, "is Python 3.9.1: expected Python 3.11 or newer; set PYTHON"),
        ({"NO_VENV": "1"}, "has no venv module: sudo apt install python3-venv"),
    ],
)
def test_an_unfit_python_is_refused_in_one_line(
    checkout: Path, environment: dict[str, str], message: str
) -> None:
    code, installs, said = set_up(checkout, "train", **environment)
    assert (code, installs) == (2, [])
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (checkout / ".venv").exists()

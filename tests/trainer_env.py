"""Environments with one trainer each, stacked on what this one has of topq_dist's own dependencies.

    .venv/bin/python tests/trainer_env.py lightning

makes .trainers/lightning unless it is there, with the extra of that name and nothing else beside
torch, numpy and what they need, which are links to this environment's, and prints its Python.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".trainers"
CONSTRAINTS = ROOT / "constraints.txt", ROOT / "tests" / "integrations" / "constraints.txt"
# what pip says where it reaches nobody
_NO_NETWORK = "NewConnectionError", "NameResolutionError", "ConnectTimeoutError", "ProxyError"


class NoNetworkError(Exception):
    """The trainer could not be downloaded."""


def make_environment(extra: str) -> Path:
    """Return the Python of an environment with topq_dist and an extra of it, made once.

    Raises NoNetworkError where the network is away, CalledProcessError where pip fails otherwise.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["optional-dependencies"][extra]
    made_of = [sys.version, *wanted, *(path.read_text() for path in CONSTRAINTS)]
    home = ENVIRONMENTS / extra
    python, stamp = home / "bin" / "python", home / "made_of.txt"
    ENVIRONMENTS.mkdir(exist_ok=True)
    with (ENVIRONMENTS / f"{extra}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.is_file() and stamp.read_text() == "\n".join(made_of):
            return python
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", home], check=True)
        shared = home / "shared"
        _link(shared, _with_dependencies(project["dependencies"]))
        (packages,) = home.glob("lib/python*/site-packages")
        (packages / "topq_dist.pth").write_text(f"{shared}\n{ROOT}\n")
        _install(python, wanted)
        stamp.write_text("\n".join(made_of))
    return python


def _with_dependencies(requirements: Iterable[str]) -> dict[str, Distribution]:
    """Return the installed distributions that these requirements come to."""
    todo, found = [Requirement(one) for one in requirements], dict[str, Distribution]()
    while todo:
        one = todo.pop()
        if one.name not in found and (one.marker is None or one.marker.evaluate({"extra": ""})):
            found[one.name] = distribution(one.name)
            todo += [Requirement(needed) for needed in found[one.name].requires or ()]
    return found


def _link(folder: Path, distributions: dict[str, Distribution]) -> None:
    folder.mkdir()
    for one in distributions.values():
        tops = {path.parts[0] for path in one.files or ()} - {"..", "__pycache__"}
        for top in tops:
            if not top.endswith(".pth"):
                (folder / top).symlink_to(Path(str(one.locate_file(top))))


def _install(python: Path, requirements: list[str]) -> None:
    constraints = [word for path in CONSTRAINTS for word in ("--constraint", str(path))]
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    done = subprocess.run(
        [*command, "--retries", "1", "--no-compile", *constraints, *requirements],
        env={**os.environ, "PYTHONPATH": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return
    if any(word in done.stderr for word in _NO_NETWORK):
        raise NoNetworkError(f"{', '.join(requirements)} could not be downloaded")
    sys.stderr.write(done.stderr)
    done.check_returncode()


if __name__ == "__main__":
    print(make_environment(sys.argv[1]))

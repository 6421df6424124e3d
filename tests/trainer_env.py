"""Environments with one trainer each, stacked on what this one has of topq_dist's own dependencies.

    .venv/bin/python tests/trainer_env.py lightning

makes .trainers/lightning unless it is there, with the extra of that name and nothing else beside
torch, numpy and what they need, which are links to this environment's, and prints its Python. What
the extra asks for itself and is here is a link as well.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".trainers"
_PINS = ROOT / "tests" / "integrations"
CONSTRAINTS = ROOT / "constraints.txt", _PINS / "constraints.txt"
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
    own = _pins(_PINS / f"constraints-{extra}.txt")
    pins = {**_pins(*CONSTRAINTS), **own}
    made_of = [sys.version, *wanted, *pins.values()]
    home = ENVIRONMENTS / extra
    python, stamp = home / "bin" / "python", home / "made_of.txt"
    ENVIRONMENTS.mkdir(exist_ok=True)
    with (ENVIRONMENTS / f"{extra}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.is_file() and stamp.read_text() == "\n".join(made_of):
            return python
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", home], check=True)
        shared = home / "shared"
        here = {canonicalize_name(one.name) for one in distributions() if one.name}
        of_extra = [one for one in wanted if canonicalize_name(Requirement(one).name) in here]
        found = _with_dependencies([*project["dependencies"], *of_extra])
        _link(shared, {name: one for name, one in found.items() if name not in own})
        (packages,) = home.glob("lib/python*/site-packages")
        (packages / "topq_dist.pth").write_text(f"{shared}\n{ROOT}\n")
        constraints = home / "constraints.txt"
        constraints.write_text("\n".join(pins.values()))
        _install(python, wanted, constraints)
        stamp.write_text("\n".join(made_of))
    return python


def _pins(*files: Path) -> dict[str, str]:
    """Return the lines of these files by the names in them; of a name the last file's."""
    lines = [line for path in files if path.is_file() for line in path.read_text().splitlines()]
    pinned = [line for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(Requirement(line).name): line for line in pinned}


def _with_dependencies(requirements: Iterable[str]) -> dict[str, Distribution]:
    """Return the installed distributions that these requirements come to, by name."""
    todo, found = [Requirement(one) for one in requirements], dict[str, Distribution]()
    while todo:
        one = todo.pop()
        name = canonicalize_name(one.name)
        if name not in found and (one.marker is None or one.marker.evaluate({"extra": ""})):
            found[name] = distribution(name)
            todo += [Requirement(needed) for needed in found[name].requires or ()]
    return found


def _link(folder: Path, distributions: dict[str, Distribution]) -> None:
    folder.mkdir()
    for one in distributions.values():
        tops = {path.parts[0] for path in one.files or ()} - {"..", "__pycache__"}
        for top in tops:
            if not top.endswith(".pth"):
                (folder / top).symlink_to(Path(str(one.locate_file(top))))


def _install(python: Path, requirements: list[str], constraints: Path) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    done = subprocess.run(
        [*command, "--retries", "1", "--no-compile", "--constraint", constraints, *requirements],
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

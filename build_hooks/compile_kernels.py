"""Compiles the C of topq_dist/compress/native into the one library that Python loads from there.

python build_hooks/compile_kernels.py: beside its sources, for a checkout that is used in place, and
only where they are newer; with --describe it says with what it would. The compiler is $CC, else a
cc, gcc or clang on the PATH, else the one in the ziglang package, which knows every target.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
NATIVE = Path("topq_dist/compress/native")
# no number may depend on the machine: neither a * b + c in one rounding nor any other liberty
FLAGS = (
    *("-std=c11", "-O3", "-g0", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-psabi"),
)
_SUFFIXES = {"darwin": "dylib", "macos": "dylib", "win32": "dll", "windows": "dll"}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A platform that ziglang compiles for: by zig's name, and by that of the wheels for it."""

    zig: str
    wheel: str

    @property
    def library(self) -> str:
        """The file's name that Python looks for there."""
        return _library(self.zig.split("-")[1].split(".")[0])


TARGETS = {
    ("linux", "x86_64"): Target(zig="x86_64-linux-gnu.2.17", wheel="manylinux2014_x86_64"),
    ("linux", "aarch64"): Target(zig="aarch64-linux-gnu.2.17", wheel="manylinux2014_aarch64"),
    ("musl", "x86_64"): Target(zig="x86_64-linux-musl", wheel="musllinux_1_2_x86_64"),
    ("musl", "aarch64"): Target(zig="aarch64-linux-musl", wheel="musllinux_1_2_aarch64"),
    ("darwin", "x86_64"): Target(zig="x86_64-macos.11.0", wheel="macosx_11_0_x86_64"),
    ("darwin", "arm64"): Target(zig="aarch64-macos.11.0", wheel="macosx_11_0_arm64"),
    ("win32", "AMD64"): Target(zig="x86_64-windows-gnu", wheel="win_amd64"),
}


class BuildError(RuntimeError):
    """The kernels cannot be compiled here; says why, and how to do without."""


def native_wanted() -> bool:
    """Return False where TOPQ_NATIVE=0 asks for a package without compiled code."""
    return os.environ.get("TOPQ_NATIVE") != "0"


def ziglang_requirement() -> str:
    """Return the ziglang that a machine without a compiler installs to build with."""
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    return next((pin for pin in pins if pin.startswith("ziglang==")), "ziglang")


def zig_target() -> Target | None:
    """Return what ziglang is to compile for; None where this machine's own compiler does it.

    That is this machine, or the platform that TOPQ_WHEEL_TARGET has by a wheel's name for it.
    """
    name = os.environ.get("TOPQ_WHEEL_TARGET")
    if name is None:
        return None if _system_compiler() else _this_target()
    for target in TARGETS.values():
        if target.wheel == name:
            return target
    raise BuildError(f"TOPQ_WHEEL_TARGET={name}: expected one of {_known_targets()}")


def describe() -> str:
    """Return in one line what the kernels are compiled with here."""
    if not native_wanted():
        return "no kernels are compiled, as TOPQ_NATIVE=0 asks"
    target = zig_target()
    if target is not None:
        return f"compiling the kernels with {ziglang_requirement()}, for {target.wheel}"
    compiler = _system_compiler()
    version = _run([*compiler, "--version"]).partition("\n")[0]
    return f"compiling the kernels with {shlex.join(compiler)}: {version}"


def library_here() -> Path:
    """Return where a checkout that is used in place has its library."""
    return ROOT / NATIVE / _library(sys.platform)


def up_to_date(library: Path) -> bool:
    """Return whether the library is there, and newer than all that it is made from."""
    made_from = [Path(__file__), *(ROOT / NATIVE).glob("*.[ch]")]
    return library.exists() and library.stat().st_mtime > max(
        source.stat().st_mtime for source in made_from
    )


def compile_kernels(library: Path) -> None:
    """Compile into the file `library`; a process that has the old one open keeps that.

    Raises BuildError with what the compiler said.
    """
    compiler, target = _system_compiler(), zig_target()
    if target is not None:
        compiler = [sys.executable, "-m", "ziglang", "cc", "-target", target.zig, "-s"]
        if importlib.util.find_spec("ziglang") is None:
            raise BuildError(
                f"{sys.executable} has no ziglang to compile with: install {ziglang_requirement()} "
                "or a C compiler, name one in CC, or do without kernels by TOPQ_NATIVE=0"
            )
    sources = sorted(path.name for path in (ROOT / NATIVE).glob("*.c"))
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".") as scratch:
        made = Path(scratch).resolve() / library.name
        # by relative names, so that none of this machine's folders is in what comes out
        _run([*compiler, *FLAGS, *sources, "-o", str(made)])
        made.replace(library)


def _system_compiler() -> list[str]:
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    return [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, cwd=ROOT / NATIVE, capture_output=True, text=True, check=False
        )
    except OSError as error:
        output: str | None = str(error)
    else:
        output = done.stdout + done.stderr if done.returncode else None
    if output is None:
        return done.stdout
    raise BuildError(
        f"the kernels do not compile:\n{shlex.join(command)}\n{output.rstrip()}\n"
        "Set CC to another compiler, or TOPQ_NATIVE=0 to do without kernels: as exact, but slower."
    )


def _this_target() -> Target:
    musl = sys.platform == "linux" and platform.libc_ver()[0] != "glibc"
    system, machine = "musl" if musl else sys.platform, platform.machine()
    if (system, machine) not in TARGETS:
        raise BuildError(
            f"{system} on {machine}: there is no C compiler on the PATH, and ziglang compiles for "
            f"{_known_targets()} only: install one, name it in CC, or do without kernels by "
            "TOPQ_NATIVE=0"
        )
    return TARGETS[system, machine]


def _known_targets() -> str:
    return ", ".join(target.wheel for target in TARGETS.values())


def _library(system: str) -> str:
    return f"_topq_kernels.{_SUFFIXES.get(system, 'so')}"


def main() -> None:
    """Compile the library of this checkout, where its sources are newer."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--describe", action="store_true", help="say with what, and do nothing")
    only_describe = parser.parse_args().describe
    try:
        if only_describe or not up_to_date(library_here()):
            print(describe(), file=sys.stderr)
            if native_wanted() and not only_describe:
                compile_kernels(library_here())
    except BuildError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


if __name__ == "__main__":
    main()

"""Makes the wheels for every platform on this one machine, and checks what can be checked of them.

python build_hooks/wheels.py [--out dist] [PLATFORM ...]: by the ziglang of constraints.txt, which
compiles for all of them, in an environment of its own. Each wheel's library is read: it is for that
machine, exports what topq_kernels.h declares, and asks for no newer a system than the wheel's name.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

from compile_kernels import NATIVE, ROOT, TARGETS, Target, ziglang_requirement
from read_library import SharedLibrary, read_library

LARGEST_WHEEL_BYTES = 400_000
_PLATFORMS = {target.wheel: target for target in TARGETS.values()}
_OLDEST_MACOS = "11.0"
_NEWEST_GLIBC = (2, 17)
# musl's loader takes libc.so for itself
_SYSTEM_LIBRARIES = {"libc.so.6", "libm.so.6", "libc.so"}


def main() -> None:
    """Make, check and list the wheels; exit with 1 where one of them is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder they go to")
    parser.add_argument("platform", nargs="*", help=f"all by default: {', '.join(_PLATFORMS)}")
    options = parser.parse_args()
    unknown = set(options.platform) - set(_PLATFORMS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(_PLATFORMS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    wrong = False
    with tempfile.TemporaryDirectory(prefix="topq-wheels-") as scratch:
        python = _build_environment(Path(scratch, "venv"))
        for platform in options.platform or _PLATFORMS:
            wheel = _build(python, platform, Path(scratch, platform))
            faults = faults_of(wheel, Path(scratch, platform))
            kept = wheel.replace(options.out / wheel.name)
            print(
                f"{kept} {kept.stat().st_size} bytes: {'; '.join(faults) or 'checked'}", flush=True
            )
            wrong |= bool(faults)
    sys.exit(wrong)


def faults_of(wheel: Path, scratch: Path) -> list[str]:
    """Return what is wrong with a wheel, whose library is unpacked to `scratch`."""
    target = _PLATFORMS[wheel.stem.rpartition("-")[2]]
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if "_topq_kernels." in name]
        if libraries != [f"{NATIVE.as_posix()}/{target.library}"]:
            return [f"holds {libraries}, expected {target.library}"]
        library = read_library(Path(archive.extract(libraries[0], scratch)))
    machine, system = target.zig.split(".")[0].split("-")[:2]
    declared = set(re.findall(r"\b(topq_\w+)\(", (ROOT / NATIVE / "topq_kernels.h").read_text()))
    exported = {name for name in library.exports if name.startswith("topq_")}
    faults = [
        (
            (library.system, library.machine) != (system, machine),
            f"the library is for {library.system} on {library.machine}",
        ),
        (declared != exported, f"exports differ by {sorted(declared ^ exported)}"),
        (
            wheel.stat().st_size > LARGEST_WHEEL_BYTES,
            f"larger than {LARGEST_WHEEL_BYTES} bytes",
        ),
        *((True, fault) for fault in _newer_than_promised(library, target)),
    ]
    return [fault for is_so, fault in faults if is_so]


def _newer_than_promised(library: SharedLibrary, target: Target) -> list[str]:
    strangers = library.needs - _SYSTEM_LIBRARIES
    faults = [f"needs {name}" for name in sorted(strangers)]
    for version in sorted(library.versions):
        if version.startswith("GLIBC_"):
            number = tuple(int(part) for part in version.removeprefix("GLIBC_").split("."))
            wrong = number > _NEWEST_GLIBC or "musl" in target.zig
        else:
            wrong = version != _OLDEST_MACOS
        if wrong:
            faults.append(f"asks for {version}")
    return faults


def _build_environment(folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    quiet = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([python, *quiet, "hatchling>=1.25", ziglang_requirement()], check=True)
    return python


def _build(python: Path, platform: str, out: Path) -> Path:
    print(f"making the wheel for {platform}", file=sys.stderr)
    subprocess.run(
        [python, "-m", "hatchling", "build", "--target", "wheel", "--directory", out],
        cwd=ROOT,
        env={**os.environ, "TOPQ_WHEEL_TARGET": platform, "TOPQ_NATIVE": "1"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return next(out.glob("*.whl"))


if __name__ == "__main__":
    main()

"""build_hooks: what compiles the kernels, when, into what, and what it says where it cannot."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
NATIVE = Path("topq_dist/compress/native")
LIBRARY = "_topq_kernels." + {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
needs_a_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no cc here")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with one kernel."""
    shutil.copytree(ROOT / "build_hooks", tmp_path / "build_hooks")
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    native = tmp_path / NATIVE
    native.mkdir(parents=True)
    shutil.copy(ROOT / "topq_dist" / "_version.py", tmp_path / "topq_dist")
    (native / "__init__.py").touch()
    (native / "twice.h").write_text("#define TWICE 2\n")
    (native / "twice.c").write_text(
        '#include "twice.h"\n'
        '__attribute__((visibility("default"))) int topq_twice(int n) { return TWICE * n; }\n'
    )
    return tmp_path


def compile_in(checkout: Path, *options: str, **environment: str) -> tuple[int, str]:
    """Return the exit code and what was said."""
    plain = {
        name: value
        for name, value in os.environ.items()
        if name not in {"CC", "TOPQ_NATIVE", "TOPQ_WHEEL_TARGET"}
    }
    done = subprocess.run(
        [sys.executable, "build_hooks/compile_kernels.py", *options],
        cwd=checkout,
        env=plain | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@needs_a_compiler
def test_the_library_is_made_beside_its_sources_and_anew_when_one_of_them_is_newer(
    checkout: Path,
) -> None:
    library = checkout / NATIVE / LIBRARY
    code, said = compile_in(checkout)
    assert code == 0
    assert said.startswith("compiling the kernels with cc: ")
    assert said.count("\n") == 1
    assert ctypes.CDLL(str(library)).topq_twice(21) == 42
    assert compile_in(checkout) == (0, "")
    header = checkout / NATIVE / "twice.h"
    later = library.stat().st_mtime + 1
    os.utime(header, (later, later))
    assert compile_in(checkout)[1] != ""
    assert sorted(path.name for path in (checkout / NATIVE).iterdir()) == sorted(
        [LIBRARY, "__init__.py", "twice.c", "twice.h"]
    )


@needs_a_compiler
def test_the_same_sources_make_the_same_library_wherever_they_lie(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "deeper"
    shutil.copytree(checkout, elsewhere)
    for root in (checkout, elsewhere):
        assert compile_in(root)[0] == 0
    assert (checkout / NATIVE / LIBRARY).read_bytes() == (elsewhere / NATIVE / LIBRARY).read_bytes()


@needs_a_compiler
def test_the_compiler_is_the_one_that_CC_names_options_included(checkout: Path) -> None:  # noqa: N802
    code, said = compile_in(checkout, CC="cc -DTWICE=3 -Werror")
    assert code == 1  # the header defines it again
    assert "TWICE" in said
    assert "TOPQ_NATIVE=0" in said


def test_a_compiler_that_is_not_there_is_named(checkout: Path) -> None:
    code, said = compile_in(checkout, CC="no-such-compiler")
    assert code == 1
    assert "no-such-compiler" in said
    assert "TOPQ_NATIVE=0" in said


@needs_a_compiler
def test_what_the_compiler_says_is_passed_on_and_the_old_library_kept(checkout: Path) -> None:
    assert compile_in(checkout)[0] == 0
    before = (checkout / NATIVE / LIBRARY).read_bytes()
    (checkout / NATIVE / "wrong.c").write_text("int topq_wrong(void) { return nothing; }\n")
    code, said = compile_in(checkout)
    assert code == 1
    assert "wrong.c:1" in said
    assert "nothing" in said
    assert "TOPQ_NATIVE=0" in said
    assert (checkout / NATIVE / LIBRARY).read_bytes() == before


def test_without_a_compiler_the_pinned_ziglang_is_asked_for(checkout: Path) -> None:
    pin = next(
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith("ziglang==")
    )
    code, said = compile_in(checkout, "--describe", PATH="")
    assert code == 0
    assert pin in said


def test_nothing_is_compiled_where_that_is_declined(checkout: Path) -> None:
    code, said = compile_in(checkout, TOPQ_NATIVE="0", CC="no-such-compiler")
    assert code == 0
    assert "TOPQ_NATIVE=0" in said
    assert not (checkout / NATIVE / LIBRARY).exists()


def test_a_platform_that_is_not_known_is_answered_with_those_that_are(checkout: Path) -> None:
    code, said = compile_in(checkout, "--describe", TOPQ_WHEEL_TARGET="win32")
    assert code == 1
    assert "win_amd64" in said


@needs_a_compiler
def test_a_wheel_is_for_one_platform_and_holds_the_library_without_its_sources(
    checkout: Path,
) -> None:
    # what a checkout that is used in place has is not what goes into a wheel
    (checkout / NATIVE / LIBRARY).write_text("old")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "made", "."],
        cwd=checkout,
        check=True,
    )
    (wheel,) = (checkout / "made").iterdir()
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(str(NATIVE))]
        assert sorted(names) == [f"{NATIVE}/__init__.py", f"{NATIVE}/{LIBRARY}"]
        (checkout / "unpacked").mkdir()
        library = archive.extract(f"{NATIVE}/{LIBRARY}", checkout / "unpacked")
    assert ctypes.CDLL(library).topq_twice(21) == 42

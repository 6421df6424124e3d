"""The kernels' library as the tests need it: the one there is, or one built for them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import topq_dist.compress.native

SOURCES = Path(topq_dist.compress.native.__file__).parent
# no contraction of a product and a sum, nor anything else that would round otherwise
FLAGS = ("-std=c11", "-O3", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden")


def compilers() -> list[list[str]]:
    """Return the commands that compile C here: $CC, cc, and the one of the ziglang package."""
    found = [[command] for command in (os.environ.get("CC", ""), "cc") if shutil.which(command)]
    if importlib.util.find_spec("ziglang"):
        found.append([sys.executable, "-m", "ziglang", "cc"])
    return found


def compile_kernels(
    compiler: Sequence[str], out: Path, *extra: str, sources: Sequence[Path] = ()
) -> subprocess.CompletedProcess[str]:
    """Compile all kernels and these sources into `out`."""
    files = [*sorted(SOURCES.glob("*.c")), *sources]
    command = [*compiler, *FLAGS, f"-I{SOURCES}", *extra, *map(str, files), "-o", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)

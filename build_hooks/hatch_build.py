"""Compiles the kernels while hatchling makes a wheel, which then is for one platform.

An editable install gets its library beside the sources; a wheel takes it from a folder of its own.
"""

from __future__ import annotations

import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).parent))
import compile_kernels as kernels


class KernelsHook(BuildHookInterface):
    """The build hook that pyproject.toml names."""

    def dependencies(self) -> list[str]:
        """Return what compiling needs that is not here."""
        by_zig = kernels.native_wanted() and kernels.zig_target() is not None
        return [kernels.ziglang_requirement()] if by_zig else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and say what the wheel is for."""
        self.app.display_info(kernels.describe())
        self._folder = tempfile.TemporaryDirectory(prefix="topq-kernels-")
        if not kernels.native_wanted():
            return
        build_data["pure_python"] = False
        library = kernels.library_here()
        if version == "editable":
            if not kernels.up_to_date(library):
                kernels.compile_kernels(library)
            return
        target = kernels.zig_target()
        made = Path(self._folder.name, library.name if target is None else target.library)
        kernels.compile_kernels(made)
        build_data["tag"] = f"py3-none-{_platform() if target is None else target.wheel}"
        build_data["force_include"][str(made)] = str(kernels.NATIVE / made.name)

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what has gone into the wheel."""
        self._folder.cleanup()


def _platform() -> str:
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")

"""Kernels compiled ahead of time, without a GPU: `python tests/gpu_compiled.py < launches.json`.

Reads a list of launches (module, name, types, constants, warps, targets), compiles each for its
targets and writes what the compilers report of it as JSON: registers, spilled bytes and bytes of
shared memory. Triton must not be its interpreter in this process.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# what has been compiled before says nothing any more
triton.knobs.compilation.always_compile = True
triton.knobs.nvidia.dump_ptxas_log = True


def compiled(launch: dict[str, Any], target: str) -> dict[str, Any]:
    """Compile one kernel, and return what is reported of it."""
    kernel = getattr(importlib.import_module(launch["module"]), launch["name"])
    constants, names = launch["constants"], kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: launch["types"].get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
    )
    options = {"num_warps": launch["warps"], "enable_fp_fusion": False}
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        made = triton.compile(source, target=TARGETS[target], options=options)
    report = {"kernel": launch["name"], "target": target, "shared_bytes": made.metadata.shared}
    if target == "gfx942":
        text = made.asm["amdgcn"]
        spilled = re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", text)
        registers = re.findall(r"\.vgpr_count:\s+(\d+)", text)
    else:
        spilled = re.findall(r"(\d+) bytes spill", log.getvalue())
        registers = re.findall(r"Used (\d+) registers", log.getvalue())
    report["spilled"] = [int(one) for one in spilled]
    report["registers"] = max(int(one) for one in registers)
    return report


def main() -> None:
    launches = json.load(sys.stdin)
    reports = [compiled(launch, target) for launch in launches for target in launch["targets"]]
    json.dump(reports, sys.stdout)


if __name__ == "__main__":
    main()

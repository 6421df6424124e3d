"""The example for torchtitan on four ranks of CPUs, once in one go, and resumed at half of it.

The ranks are forked from one process, since to import torchtitan takes longer than to train. It is
given what it lacks here: that the device is a CPU, torch.distributed.set_timeout, which torch 2.13
does not have, and sums that gloo can form.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.tools import utils

RANKS = 4


class _Cpu:
    """torch.cpu, and what torchtitan asks of torch.cuda besides."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        return 0

    def get_device_name(self, _: Any) -> str:
        return "CPU"

    def get_device_properties(self, _: Any) -> SimpleNamespace:
        return SimpleNamespace(total_memory=2**30)

    def memory_stats(self, _: Any) -> dict[str, int]:
        return {}

    def reset_peak_memory_stats(self) -> None:
        pass

    def empty_cache(self) -> None:
        pass


def _add_up(model: nn.Module) -> None:
    """Have gradients added up, which torchtitan asks NCCL to do with a factor."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


if __name__ == "__main__":
    # before any other part of torchtitan is imported
    utils.device_type, utils.device_module = "cpu", _Cpu()
    if not hasattr(dist, "set_timeout"):
        dist.set_timeout = dist.distributed_c10d._set_pg_timeout  # type: ignore[attr-defined]
    from torchtitan.config import ConfigManager
    from torchtitan.distributed import fsdp

    import topq_dist.register  # noqa: F401 - for the ranks

    fsdp.disable_fsdp_gradient_division = _add_up
    example, folder = sys.argv[1], Path(sys.argv[2])
    # beside this file
    counting = importlib.import_module("torchtitan_counting")
    run_forked = importlib.import_module("forked_ranks").run_forked
    counting.save_tokenizer(str(folder / "tokenizer.json"))
    of_all = ["--module", counting.__name__, "--config", "counting"]
    of_all += ["--hf_assets_path", str(folder)]
    ConfigManager().parse_args(of_all)  # what it reads it keeps, for all ranks
    run_forked(RANKS, example, [*of_all, "--dump_folder", str(folder / "whole")])
    print("resumed:", flush=True)
    half = "checkpoint/step-10"
    shutil.copytree(folder / "whole" / half, folder / "resumed" / half)
    run_forked(RANKS, example, [*of_all, "--dump_folder", str(folder / "resumed")])

"""The example for torchtitan on four ranks of CPUs, once in one go, and resumed at half of it.

The ranks are forked from one process, since to import torchtitan takes longer than to train. It is
given what it lacks here: that the device is a CPU, torch.distributed.set_timeout, which torch 2.13
does not have, and sums that gloo can form.
"""

from __future__ import annotations

import importlib
import os
import runpy
import shutil
import signal
import socket
import sys
import traceback
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


def _run(example: str, arguments: list[str]) -> None:
    """Run the example in as many processes; the first that fails is the end of all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = set()
    for rank in range(RANKS):
        process = os.fork()
        if process == 0:
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
            os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            _be_rank(example, arguments)
        ranks.add(process)
    while ranks:
        process, status = os.wait()
        ranks.remove(process)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            sys.exit("a rank has failed")


def _be_rank(example: str, arguments: list[str]) -> None:
    sys.argv = [example, *arguments]
    failed = True
    try:
        runpy.run_path(example, run_name="__main__")
        failed = False
    except BaseException:  # noqa: BLE001 - this process is to end here, whatever it was
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(failed)


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
    counting = importlib.import_module("torchtitan_counting")
    counting.save_tokenizer(str(folder / "tokenizer.json"))
    of_all = ["--module", counting.__name__, "--config", "counting"]
    of_all += ["--hf_assets_path", str(folder)]
    ConfigManager().parse_args(of_all)  # what it reads it keeps, for all ranks
    _run(example, [*of_all, "--dump_folder", str(folder / "whole")])
    print("resumed:", flush=True)
    half = "checkpoint/step-10"
    shutil.copytree(folder / "whole" / half, folder / "resumed" / half)
    _run(example, [*of_all, "--dump_folder", str(folder / "resumed")])

"""The run of one worker of a parameter server."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from topq_dist import Stats
from topq_dist.ps import ParameterServerOptimizer
from training import checkpoint
from training.connection import WORKER_PLACE, ServerUnfitError
from training.data import Data
from training.result import Result
from training.resume import checkpoint_folder, run_config
from training.run import HISTORY_KEYS, Run
from training.running_server import check_servers
from training.worker_options import Worker

# what _save writes and _resume reads
SHARED_KEYS = HISTORY_KEYS | {"model"}
OWN_KEYS = frozenset({"optimizer", "generator"})


class PsRun(Run):
    """One worker's training run; its checkpoints are its own, in step with no other's.

    Raises CheckpointError where --checkpoint does not fit, ServerUnfitError where the server
    trains otherwise than --inner-opt and --lr say.
    """

    def __init__(
        self, options: Worker, data: Data, model: nn.Module, optimizer: ParameterServerOptimizer
    ) -> None:
        training = options.training
        check_servers(options.connection, options.name, training)
        folder = training.checkpoint and checkpoint_folder(training.checkpoint, "ps", options.name)
        super().__init__(
            options,
            data,
            model,
            rank=options.rank,
            ranks=options.ranks,
            config=run_config(training, "ps", options.ranks, model),
            folder=folder,
        )
        self._optimizer = optimizer
        self._name = options.name
        if self._start is not None:
            self._resume(self._start)
            return
        # only at the beginning: later, a schedule of the workers may have changed it
        rates = {group["lr"] for group in optimizer.param_groups}
        # a schedule gives all groups the same
        fits = (
            training.lr in rates if training.lr_schedule == "constant" else rates == {training.lr}
        )
        if not fits:
            raise ServerUnfitError(
                f"--lr {training.lr:g}: the server has "
                f"{', '.join(f'{rate:g}' for rate in sorted(rates))}: expected the same"
            )
        if self._folder is not None:
            # before the first push: a worker without a checkpoint has pushed nothing
            self._save(self._folder, 0)

    def finish(self) -> Result:
        """Test the server's own parameters, leave it, and report."""
        with self._optimizer.central():
            result = self._result()
        self._optimizer.close()
        if self._options.result is not None:
            result.write(Path(str(self._options.result).replace(WORKER_PLACE, self._name)))
        else:
            print(f"{self._name}: test accuracy {100 * result.test_accuracy:.2f} %")
            print(f"parameters sha256: {result.parameters_sha256}")
        return result

    def _stats(self, steps: int) -> Stats:
        return self._optimizer.stats()

    def _received(self, stats: Stats) -> int:
        return stats.received_bytes

    def _save(self, folder: Path, step: int) -> None:
        checkpoint.save(
            folder,
            step,
            config=self._config,
            shared={"model": self._module.state_dict(), **self._history()},
            own={"optimizer": self._optimizer.state_dict(), "generator": torch.get_rng_state()},
        )

    def _resume(self, start: Path) -> None:
        shared, own = checkpoint.load(start, 0)
        self._module.load_state_dict(shared["model"])
        self._optimizer.load_state_dict(own["optimizer"])
        torch.set_rng_state(own["generator"])
        self._take_up(shared)

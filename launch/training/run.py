"""The surroundings of a training loop, whatever carries its gradients: batches, losses, result."""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from topq_dist import Stats
from training.checkpoint import Config, checkpoint_to_resume
from training.data import Data, batch_indices
from training.link import EmulatedLink
from training.models import evaluate
from training.report import Result
from training.settings import MODE_NAMES, Rank

# of a checkpoint, what _history returns
HISTORY_KEYS = frozenset(
    {"losses", "sent_bytes", "received_bytes", "train_s", "held_s", "accuracies"}
)
# how often the model is tested on the way, and on how many samples: enough for a curve
CURVE_POINTS = 40
CURVE_SAMPLES = 1000


class Run(ABC):
    """One rank's training run; `module` is the model itself, not what wraps it.

    A subclass says what has been moved, and what a checkpoint holds: `_start` is the one to go on
    from, which it reads at the end of its own construction.
    """

    def __init__(
        self,
        options: Rank,
        data: Data,
        module: nn.Module,
        *,
        rank: int,
        ranks: int,
        config: Config,
        folder: Path | None,
    ) -> None:
        self._options = options
        self._training = options.training
        self._data = data
        self._module = module
        self._rank, self._ranks = rank, ranks
        self._config = config
        self._folder = folder
        self._start = (
            None if folder is None else checkpoint_to_resume(options.training, folder, config)
        )
        self._losses: list[float] = []
        self._sent_bytes: list[int] = []
        self._received_bytes: list[int] = []
        self._accuracies: list[tuple[float, float]] = []
        self._link = EmulatedLink(self._training.link, options.mode, ranks)
        self._curve_every = max(1, self._training.steps // CURVE_POINTS)
        self._earlier_s = 0.0
        self._started_s = 0.0

    def steps(self) -> Iterator[int]:
        """Yield the number of each step to take, with a progress bar on rank 0's terminal."""
        bar = tqdm(
            range(len(self._losses), self._training.steps),
            initial=len(self._losses),
            total=self._training.steps,
            desc=MODE_NAMES[self._options.mode].ljust(9),
            unit="step",
            # None: only where stderr is a terminal
            disable=None if self._rank == 0 else True,
        )
        self._started_s = time.perf_counter()
        for step in bar:
            yield step
            bar.set_postfix(loss=f"{self._losses[-1]:.3f}", refresh=False)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return this rank's (inputs, targets) of `step`."""
        indices = batch_indices(
            len(self._data.train_inputs),
            seed=self._training.seed,
            step=step,
            rank=self._rank,
            ranks=self._ranks,
            batch_size=self._training.batch_size,
        )
        return self._data.train_inputs[indices], self._data.train_targets[indices]

    def record(self, step: int, loss: Tensor) -> None:
        """Note what `step` came to, and write a checkpoint where one is due."""
        self._losses.append(float(loss))
        stats, done = self._stats(step + 1), step + 1
        sent_before, received_before = self._moved()
        self._sent_bytes.append(stats.sent_bytes)
        received_bytes = self._received(stats)
        if received_bytes is not None:
            self._received_bytes.append(received_bytes)
        sent, received = self._moved()
        self._link.hold_back(sent - sent_before, received - received_before)
        if self._rank == 0 and done % self._curve_every == 0:
            self._test_on_the_way()
        if self._folder is not None and (
            done % self._training.checkpoint_every == 0 or done == self._training.steps
        ):
            self._save(self._folder, done)

    @abstractmethod
    def finish(self) -> Result | None:
        """Test the model and report; None on a rank that has nothing to say."""

    @abstractmethod
    def _stats(self, steps: int) -> Stats:
        """Return what this rank sent in all of its `steps`, and what dense would have."""

    @abstractmethod
    def _received(self, stats: Stats) -> int | None:
        """Return the bytes that came back for what `stats` sent, or None where none counts them."""

    @abstractmethod
    def _save(self, folder: Path, step: int) -> None:
        """Write a checkpoint."""

    def _moved(self) -> tuple[int, int]:
        """Return the bytes sent and received so far."""
        return sum(self._sent_bytes[-1:]), sum(self._received_bytes[-1:])

    def _test_on_the_way(self) -> None:
        """Note the accuracy after so many seconds of training, to which this does not count."""
        elapsed_s = self._elapsed_s()
        some = slice(CURVE_SAMPLES)
        accuracy, _ = evaluate(
            self._module, self._data.test_inputs[some], self._data.test_targets[some]
        )
        self._accuracies.append((elapsed_s, accuracy))
        self._started_s += self._elapsed_s() - elapsed_s

    def _result(self) -> Result:
        """Test the model as it is now and return what the run came to."""
        train_s = self._elapsed_s()
        accuracy, loss = evaluate(self._module, self._data.test_inputs, self._data.test_targets)
        stats = self._stats(len(self._losses))
        dense = self._options.mode == "dense"
        return Result(
            mode=self._options.mode,
            data=self._training.data,
            ranks=self._ranks,
            q=None if dense else self._training.q,
            inner_opt=self._training.inner_opt,
            lr=self._training.lr,
            batch_size=self._training.batch_size,
            seed=self._training.seed,
            steps=self._training.steps,
            parameters=sum(p.numel() for p in self._module.parameters()),
            parameters_sha256=parameters_sha256(self._module),
            test_accuracy=accuracy,
            test_loss=loss,
            dense_bytes=stats.dense_bytes,
            select_s=None if dense else stats.select_s,
            wait_s=None if dense else stats.wait_s,
            train_s=train_s,
            link=self._training.link,
            held_s=self._link.held_s,
            accuracies=self._accuracies,
            losses=self._losses,
            sent_bytes=self._sent_bytes,
            received_bytes=self._received_bytes or None,
        )

    def _history(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the steps behind it."""
        return {
            "losses": self._losses,
            "sent_bytes": self._sent_bytes,
            "received_bytes": self._received_bytes,
            "train_s": self._elapsed_s(),
            "held_s": self._link.held_s,
            "accuracies": self._accuracies,
        }

    def _go_on_from(self, history: dict[str, Any]) -> None:
        """Go on from what `_history` returned."""
        self._losses = history["losses"]
        self._sent_bytes = history["sent_bytes"]
        self._received_bytes = history["received_bytes"]
        self._earlier_s = history["train_s"]
        self._link.held_s = history["held_s"]
        self._accuracies = history["accuracies"]

    def _elapsed_s(self) -> float:
        return self._earlier_s + time.perf_counter() - self._started_s


def parameters_sha256(model: nn.Module) -> str:
    """Return the SHA-256 of the parameters' bytes, in the order of their registration."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()

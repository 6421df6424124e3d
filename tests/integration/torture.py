"""One training run whose server, and one of whose workers, are killed (kill -9) at random moments.

Run as a script it tells what happened, beside a run in which nothing did:
python tests/integration/torture.py --kills 30 --anew
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from forked import FORKED
from integration.endings import Ending, central_parameters, durable_version, ending
from ps.workers import backward, batch, make_model, side_by_side, values
from server_process import ServerProcess

from topq_dist.ps import ParameterServerOptimizer
from topq_dist.ps.protocol.config import Mode, ServingConfig, TrainingConfig

TRAINING = TrainingConfig(
    inner_opt="adamw", options={"lr": 0.01, "weight_decay": 0.1}, downlink="topq", q=0.9
)
# its steps add up to the same in any order
ASYNC_LR = 0.05
ASYNC_TRAINING = TrainingConfig(mode="async", inner_opt="sgd", options={"lr": ASYNC_LR})
_CHECKPOINT_EVERY = 10
_STARTING_SHARE = 0.3
_RUN_S = 500.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run of `steps` steps, and how often what is killed in it.

    crash_at: points at which the server kills itself, one process after the other (see `arm`).
    worker_kills: of worker 0, which goes on from its checkpoint; `together`: of the server too.
    anew: a fresh interpreter for each server.
    """

    steps: int = 150
    workers: int = 3
    snapshot_every: int = 7
    server_kills: int = 0
    crash_at: tuple[str, ...] = ()
    worker_kills: int = 0
    together: bool = False
    seed: int = 1
    mode: Mode = "sync"
    anew: bool = False


@dataclass(frozen=True, kw_only=True)
class Report:
    """How a run ended, and what had happened.

    held: each worker's parameters. central: the server's. given: what each worker's gradients add
    up to less its residual at the end; none for a worker in processes of its own. kills: by
    what was killed. lost: versions that the server had answered and came back without, all kills
    together (in sync mode).
    """

    ending: Ending
    held: list[Tensor]
    central: Tensor
    given: list[Tensor]
    kills: Counter[str]
    lost: int
    took_s: float


def torture(folder: Path, plan: Plan) -> Report:
    """Train as `plan` says, from the beginning to the server's orderly end."""
    serving = ServingConfig(
        start_workers=plan.workers,
        max_workers=plan.workers,
        snapshot_every=plan.snapshot_every,
        lease_s=60.0,
    )
    start_s = time.monotonic()
    training = TRAINING
    if plan.mode == "async":
        # a busy machine may keep one worker back for long
        every = plan.steps * plan.workers
        training = dataclasses.replace(ASYNC_TRAINING, max_staleness=every)
    given: list[Tensor] = []
    with ServerProcess(folder / "state", training, serving, anew=plan.anew) as server:
        killing = _Killing(server, folder, plan)

        def work(worker: int) -> Tensor:
            if worker == 0 and plan.worker_kills:
                return killing.worker()
            return train(server.address, worker, plan.steps, killing.reach, given=given)

        try:
            held = side_by_side(plan.workers, work, within_s=_RUN_S)
        finally:
            killing.finish()
        code, said = server.terminate()
        assert code == 0, said
    return Report(
        ending=ending(server.state_dir, training),
        held=held,
        central=central_parameters(server.state_dir, training),
        given=given,
        kills=killing.kills,
        lost=killing.lost,
        took_s=time.monotonic() - start_s,
    )


def train(
    server: str,
    worker: int,
    steps: int,
    reach: Callable[[int], None],
    checkpoint: Path | None = None,
    *,
    given: list[Tensor] | None = None,
) -> Tensor:
    """Train as one worker, from the checkpoint on where it is there; return what it holds.

    reach: called with the number of each step before it. given: see Report; appended to.
    """
    model = make_model()
    total = torch.zeros(values(model).numel(), dtype=torch.float64)
    first = 0
    with ParameterServerOptimizer(
        model.named_parameters(), server, q=0.9, worker=f"worker{worker}", timeout_s=_RUN_S
    ) as optimizer:
        if checkpoint is not None and checkpoint.exists():
            saved = torch.load(checkpoint, weights_only=True)
            optimizer.load_state_dict(saved["optimizer"])
            model.load_state_dict(saved["model"])
            first = saved["step"]
        for step in range(first, steps):
            if checkpoint is not None and step % _CHECKPOINT_EVERY == 0:
                state = {"optimizer": optimizer.state_dict(), "model": model.state_dict()}
                torch.save({**state, "step": step}, checkpoint.with_suffix(".partial"))
                checkpoint.with_suffix(".partial").replace(checkpoint)
            reach(step)
            optimizer.zero_grad()
            backward(model, [batch(worker, step)])
            total += flat(p.grad for p in model.parameters() if p.grad is not None)
            optimizer.step()
        residuals = optimizer.state_dict()["topq"]["servers"][0]["residuals"]
    if given is not None:
        given.append(total - flat(residuals[name] for name, _ in model.named_parameters()))
    return values(model)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Return these tensors as one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


class _Killing:
    """Kills what the plan says, in threads of its own, and starts it again at once.

    Moments are drawn over all steps, and then within the next part of a second; some of the
    server's are drawn within the time that it takes to start.
    """

    def __init__(self, server: ServerProcess, folder: Path, plan: Plan) -> None:
        self.kills: Counter[str] = Counter()
        self.lost = 0
        self._server = server
        self._folder = folder
        self._plan = plan
        self._draws = random.Random(plan.seed)
        self._reached = -1
        self._errors: list[BaseException] = []
        self._over = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def reach(self, step: int) -> None:
        """Note a step of a worker; the last one waits until all has been killed."""
        self._reached = max(step, self._reached)
        if step == self._plan.steps - 1:
            self._done.wait(_RUN_S)

    def finish(self) -> None:
        """End the thread; raises what went wrong in it."""
        self._over.set()
        self._thread.join(_RUN_S)
        if self._errors:
            raise self._errors[0]

    def _run(self) -> None:
        try:
            if self._plan.crash_at:
                self._see_crashes()
            self._kill_at_random()
        except BaseException as error:  # noqa: BLE001 - raised by `finish`
            self._errors.append(error)
        finally:
            self._done.set()

    def _await_step(self, step: int) -> None:
        while self._reached < step and not self._over.is_set():
            time.sleep(0.001)

    def _see_crashes(self) -> None:
        """Have one process after the other die where it is told to."""
        self._await_step(3)
        self._server.kill()
        for point in self._plan.crash_at:
            self._server.launch(point)
            self._server.process.join(60)
            assert self._server.process.exitcode == -9, f"{point}: {self._server.said()}"
            self._count(point.split()[0])
        self._server.launch()

    def _kill_at_random(self) -> None:
        steps = sorted(
            self._draws.randrange(self._plan.steps - 1) for _ in range(self._plan.server_kills)
        )
        start_s = 0.3
        for step in steps:
            if self.kills and self._draws.random() < _STARTING_SHARE:
                time.sleep(start_s * self._draws.random())
                what = "listening" if self._server.listens() else "starting"
            else:
                start_s = max(start_s, self._server.await_listening())
                self._await_step(step)
                # workers take up to a second to come back: some find it dead again, some do not
                time.sleep(self._draws.choice((0.03, 0.6)) * self._draws.random())
                what = "listening"
            self._kill_server(what)

    def _kill_server(self, what: str) -> None:
        self._server.kill()
        self._count(what)
        self._server.launch()

    def _count(self, what: str) -> None:
        self.kills[what] += 1
        if what != "starting":
            self.lost += max(0, self._reached - durable_version(self._server.state_dir))

    def worker(self) -> Tensor:
        """Train as worker 0 in processes that are killed; return what the last one held."""
        last = self._plan.steps - _CHECKPOINT_EVERY
        steps = sorted(self._draws.sample(range(1, last), self._plan.worker_kills))
        result = self._folder / "worker0.pt"
        for step in [*steps, self._plan.steps]:
            # without a lock, which the killed would keep
            mine = FORKED.RawValue("l", -1)
            process = FORKED.Process(
                target=_train_as_process,
                args=(self._server.address, self._plan.steps, mine, self._folder),
                daemon=True,
            )
            process.start()
            while process.is_alive() and mine.value < step:
                self.reach(mine.value)
                time.sleep(0.001)
            if step < self._plan.steps:
                time.sleep(0.01 * self._draws.random())
                process.kill()
                if self._plan.together:
                    self._kill_server("listening")
            process.join(_RUN_S)
            expected = -9 if step < self._plan.steps else 0
            assert process.exitcode == expected, f"worker 0 ended with {process.exitcode}"
            self.kills["worker"] += expected == -9
        held: Tensor = torch.load(result, weights_only=True)
        return held


def _train_as_process(server: str, steps: int, mine: Any, folder: Path) -> None:
    torch.set_num_threads(1)

    def reach(step: int) -> None:
        mine.value = step

    held = train(server, 0, steps, reach, folder / "checkpoint.pt")
    torch.save(held, folder / "worker0.pt")


def _main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="of the server")
    parser.add_argument("--worker-kills", type=int, default=0)
    parser.add_argument("--together", action="store_true", help="the server with the worker")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--snapshot-every", type=int, default=7)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--anew", action="store_true", help="start a Python for each server")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    plan = Plan(
        steps=given.steps,
        workers=given.workers,
        snapshot_every=given.snapshot_every,
        server_kills=given.kills,
        worker_kills=given.worker_kills,
        together=given.together,
        seed=given.seed,
        anew=given.anew,
    )
    calm = dataclasses.replace(plan, server_kills=0, worker_kills=0)
    with tempfile.TemporaryDirectory() as calm_folder, tempfile.TemporaryDirectory() as folder:
        expected = torture(Path(calm_folder), calm)
        found = torture(Path(folder), plan)
    applied = sum(found.ending.applied.values())
    due = plan.steps * plan.workers
    print(f"kills: {dict(found.kills)}")
    print(f"versions answered and made again: {found.lost}")
    print(f"pushes: {due} made, {applied} applied, {found.ending.version} versions")
    print(f"took {found.took_s:.1f} s, undisturbed {expected.took_s:.1f} s")
    for name in ("parameters_sha256", "state_sha256"):
        one, other = getattr(expected.ending, name), getattr(found.ending, name)
        print(f"{name}: {other} {'as' if one == other else 'NOT AS'} undisturbed")
    same = found.ending == expected.ending and all(
        torch.equal(held, expected.held[0]) for held in [*expected.held, *found.held]
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(_main())

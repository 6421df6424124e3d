"""Two hosts that train under torchrun, of which one is lost and comes back.

    sudo python benchmarks/lost_host.py --seeds 3       # a minute a seed; needs root, iproute2

Three hosts out of network namespaces: one keeps the rendezvous, two run examples/many_machines.py
under torchrun, joined by links of 1 Gbit. Once the job has taken a quarter of its steps, the link
of the host with rank 0 goes down and all of its processes are killed. The other must go on alone
from the last checkpoint, with what both had not sent, and once it has made another the lost host
comes back. Until then steps are slow, so that some are left. Prints the accuracy beside that of
dense training without a disturbance, and writes runs/lost_host.json; ends with 1 where it is over
half a point below, or residuals are lost.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from harness.console import integer_from, option_parser, say, text_table, write_report
from harness.netns import INTERFACE, Hosts, hosts
from harness.watched_job import MASTER, SLOW
from harness.worker_pool import killed_at_the_end, worker_environment
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
POINTS_BELOW = 0.5
# of fp32 sums
ROUNDING = 1e-6
STEPS = 600
# a host that comes back would look for the others in another store than they for it
ANEW = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
LIMIT_S = 120.0
_ENDED = re.compile(r"^([\d.]+) % of the test part", re.MULTILINE)
_STARTED = re.compile(r"^step (\d+): a world of (\d)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a run, and the accuracy in percent.

    starts: of each start the step, and the ranks. recovered_s: from the loss of a host until the
    other goes on. moved: of each start but the first, how far the residuals' sum over all
    ranks is from that in the checkpoint, over its norm.
    """

    starts: list[tuple[int, int]]
    accuracy: float
    recovered_s: float = 0.0
    moved: list[float] = field(default_factory=list)


class Job:
    """A job on the hosts 1 and 2 whose rendezvous is on host 0; `folder` is seen by both.

    words: what torchrun is to run. conf: what it is told of the rendezvous.
    """

    def __init__(
        self, made: Hosts, folder: Path, words: Sequence[str], conf: str = "is_host=0"
    ) -> None:
        self.checkpoint = folder / "checkpoint.pt"
        self.folder = folder
        self._hosts, self._words, self._conf = made, words, conf
        self._processes: list[subprocess.Popen[str]] = []
        self.agents: dict[int, subprocess.Popen[str]] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have both hosts, and the rendezvous, run within the block."""
        with killed_at_the_end() as self._processes:
            try:
                store = ["-m", "topq_dist.elastic.store", "10.77.0.1:29400"]
                self._start(0, store, "store")
                self.wait_for(lambda: "port" in self.said("store"))
                for host in (1, 2):
                    self.start(host)
                yield
            finally:
                for host in self.agents:
                    self._kill_all(host)

    def start(self, host: int) -> None:
        """Start torchrun on a host, as its own machine would."""
        words = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "9"]
        words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29400"]
        words += ["--rdzv-conf", self._conf, "--local-addr", f"10.77.0.{host + 1}"]
        argv = ["-m", "torch.distributed.run", *words, *self._words]
        self.agents[host] = self._start(host, argv, "job")

    def lose(self, host: int) -> None:
        """Take a host away: nobody hears of it any more, and all that it ran is over."""
        self._link(host, "down")
        self._kill_all(host)

    def bring_back(self, host: int) -> None:
        """Have a lost host come back, and start as it did before."""
        self._link(host, "up")
        self.start(host)

    def said(self, name: str = "job") -> str:
        """Return what has been said so far on stdout, by both hosts."""
        path = self.folder / f"{name}.out"
        return path.read_text() if path.exists() else ""

    def step(self) -> int:
        """Return the step of the last checkpoint, 0 before the first."""
        if not self.checkpoint.exists():
            return 0
        step: int = torch.load(self.checkpoint, weights_only=True)["step"]
        return step

    def rank0(self) -> int:
        """Return the host that rank 0 has been on since the last start."""
        return int((self.folder / MASTER).read_text().split(".")[-1]) - 1

    def wait_for(self, found: Callable[[], bool]) -> None:
        """Return once this is so; raises RuntimeError with what was said where it takes long."""
        deadline = time.monotonic() + LIMIT_S
        while not found():
            if time.monotonic() > deadline:
                errors = (self.folder / "errors").read_text()
                raise RuntimeError(f"nothing for {LIMIT_S:g} s: {self.said()}\n{errors[-4000:]}")
            time.sleep(0.02)

    def _start(self, host: int, argv: Sequence[str], name: str) -> subprocess.Popen[str]:
        with (
            (self.folder / f"{name}.out").open("a") as out,
            (self.folder / "errors").open("a") as errors,
        ):
            process = subprocess.Popen(
                self._hosts.command(host, [sys.executable, *argv]),
                stdout=out,
                stderr=errors,
                env=worker_environment(INTERFACE) | ANEW,
                process_group=0,  # Ctrl-C is for the one who cleans up
                text=True,
            )
        self._processes.append(process)
        return process

    def _link(self, host: int, state: str) -> None:
        namespace = self._hosts.namespaces[host]
        words = ["ip", "-n", namespace, "link", "set", INTERFACE, state]
        subprocess.run(words, check=True)

    def _kill_all(self, host: int) -> None:
        """Kill whatever runs in a host's namespace: torchrun's ranks have sessions of their own."""
        words = ["ip", "netns", "pids", self._hosts.namespaces[host]]
        found = subprocess.check_output(words, text=True).split()
        for pid in map(int, found):
            with ExitStack() as ignoring:
                ignoring.push(lambda kind, *_: kind is ProcessLookupError)
                os.kill(pid, signal.SIGKILL)


def disturbed(job: Job, steps: int) -> Outcome:
    """Run a job of so many steps that loses the host of rank 0, and has it back later.

    Raises RuntimeError where it does not end, or not well.
    """
    slow = job.folder / SLOW
    slow.touch()
    with job.running():
        job.wait_for(lambda: job.step() >= steps // 4)
        lost = job.rank0()
        job.lose(lost)
        lost_s = time.monotonic()
        job.wait_for(lambda: len(outcome(job.said()).starts) == 2)
        recovered_s = time.monotonic() - lost_s
        step = job.step()
        job.wait_for(lambda: job.step() > step)
        job.bring_back(lost)
        job.wait_for(lambda: len(outcome(job.said()).starts) == 3)
        slow.unlink()
        job.wait_for(lambda: all(agent.poll() is not None for agent in job.agents.values()))
    codes = [agent.returncode for agent in job.agents.values()]
    if any(codes):
        raise RuntimeError(f"torchrun ended with {codes}: {job.said()}")
    found = outcome(job.said())
    moved = [moved_residuals(job.folder, step, ranks) for step, ranks in found.starts[1:]]
    return replace(found, recovered_s=recovered_s, moved=moved)


def outcome(said: str) -> Outcome:
    """Return what a run has come to so far, from what it said; an accuracy of NaN until it ends."""
    starts = [(int(step), int(ranks)) for step, ranks in _STARTED.findall(said)]
    return Outcome(starts=starts, accuracy=float((_ENDED.findall(said) or ["nan"])[-1]))


def moved_residuals(folder: Path, step: int, ranks: int) -> float:
    """Return how far residuals are, as so many ranks resumed them, from those of the checkpoint."""
    saved = sum_of(folder.glob(f"saved-{step}-*"))
    resumed = sum_of(folder.glob(f"resumed-{step}-{ranks}-*"))
    norm = torch.cat([one.flatten() for one in saved.values()]).norm()
    return max(float((resumed[name] - one).norm() / norm) for name, one in saved.items())


def sum_of(files: Iterable[Path]) -> dict[str, Tensor]:
    """Return the sum over ranks of residuals by name, in float64."""
    found: dict[str, Tensor] = {}
    for path in files:
        for name, one in torch.load(path, weights_only=True).items():
            found[name] = found.get(name, torch.zeros_like(one, dtype=torch.float64)) + one
    return found


def dense(seed: int, steps: int, folder: Path, *, ranks: int = 2) -> Outcome:
    """Train with dense gradients and nothing lost; one rank takes the same steps as two."""
    folder.mkdir()
    words = ["--standalone", "--nproc-per-node", str(ranks), *script(folder, seed, steps), "dense"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words],
        env=worker_environment("lo"),
        capture_output=True,
        text=True,
        check=True,
    )
    return outcome(done.stdout)


def script(folder: Path, seed: int, steps: int, timeout_s: float = 15.0) -> list[str]:
    """Return what torchrun is to run: the example, watched."""
    watched = ROOT / "benchmarks" / "harness" / "watched_job.py"
    return [str(watched), str(folder), str(seed), str(steps), str(timeout_s)]


def main() -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--seeds", type=integer_from(1), default=3)
    options = parser.parse_args()
    rows: dict[str, list[str]] = {}
    report = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory(prefix="topq-bench-") as name, hosts(3, rate="1gbit") as h:
            folder = Path(name)
            without = dense(seed, STEPS, folder / "dense")
            found = disturbed(Job(h, folder, script(folder, seed, STEPS)), STEPS)
        say(f"seed {seed}: {found}, dense {without.accuracy:.2f} %")
        report.append({"seed": seed, "dense": without.accuracy, **asdict(found)})
        went_on = ", ".join(f"{ranks} from {step}" for step, ranks in found.starts)
        percent = f"{found.accuracy:.2f} %", f"{without.accuracy:.2f} %"
        moved = f"{max(found.moved):.0e}"
        rows[str(seed)] = [went_on, f"{found.recovered_s:.0f} s", moved, *percent]
    write_report(options.out, "lost_host", {"steps": STEPS, "rows": report})
    heads = ["ranks from step", "recovered in", "residuals moved", "accuracy", "dense"]
    print(text_table("seed", heads, rows))
    fine = (
        row["accuracy"] >= row["dense"] - POINTS_BELOW and max(row["moved"]) < ROUNDING
        for row in report
    )
    return int(not all(fine))


if __name__ == "__main__":
    sys.exit(main())

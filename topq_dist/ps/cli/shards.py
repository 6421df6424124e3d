"""The servers that `topq serve` runs: one in this process, or several, a process each."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

import click

from topq_dist.ps.cli.configs import usage_errors
from topq_dist.ps.protocol.config import ServingConfig, TrainingConfig
from topq_dist.ps.security.many_addresses import in_one_name, next_addresses
from topq_dist.ps.security.policy import ServerSecurity
from topq_dist.ps.server.view_addresses import view_address
from topq_dist.telemetry.logs import LogFormat, formatter

_log = logging.getLogger(__name__)
# what a shard tells of, beside its views
_ADDRESS, _ERROR, _WRONG = "address", "error", "wrong"
# as state/directory_lock.py names it, which imports torch
_LOCK = "lock"
_SHARD = re.compile("shard-[0-9]+")
Tell = Callable[[str, str], None]


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server to be run: where it listens and keeps its state, and how it logs."""

    training: TrainingConfig
    serving: ServingConfig
    security: ServerSecurity
    address: str
    state_dir: Path
    log_level: str
    log_format: LogFormat
    program: str = "topq serve"

    def run(self, tell: Tell) -> None:
        """Run it until it is told to stop; tell("address", ...) and of each view where it is.

        For the main thread. Raises click.UsageError for what cannot be, and click.ClickException.
        """
        told = logging.StreamHandler()
        told.setFormatter(formatter(self.log_format, self.program))
        logging.basicConfig(level=self.log_level.upper(), handlers=[told])
        serving = self.serving
        with exit_on_sigterm():
            from topq_dist.ps.server.process import serve
            from topq_dist.ps.state.snapshot_file import StateError

            try:
                with usage_errors():
                    serve(
                        self.training,
                        serving,
                        state_dir=self.state_dir,
                        address=self.address,
                        security=self.security,
                        on_listening=lambda address: tell(_ADDRESS, str(address)),
                        **({} if serving.metrics is serving.http is None else {"on_view": tell}),
                    )
            except (StateError, OSError, RuntimeError) as error:
                _log.debug("where it failed:", exc_info=True)
                raise click.ClickException(str(error)) from error


def split(server: Server, shards: int) -> list[Server]:
    """Return the servers that share a model: ports, and those of the views, one after the other.

    Each has its state in shard-0, shard-1, ... of `server.state_dir`, which `run_shards` makes.
    Raises ValueError for an address of no port, and a folder with the state of another number of
    shards.
    """
    folders = server.state_dir.glob("shard-*")
    found = sum(_SHARD.fullmatch(path.name) is not None and path.is_dir() for path in folders)
    if found not in (0, shards) or (shards == 1 and found) or _has_own_state(server, shards):
        raise ValueError(
            f"state_dir={str(server.state_dir)!r}: has the state of {found or 1} shards, not of"
            f" {shards}: expected as many as the run began with, or another folder"
        )
    if shards == 1:
        return [server]
    serving = server.serving
    made = []
    for shard, address in enumerate(next_addresses(server.address, shards)):
        state_dir = server.state_dir / f"shard-{shard}"
        made.append(
            replace(
                server,
                address=address,
                state_dir=state_dir,
                program=f"{server.program}: shard {shard}",
                serving=replace(
                    serving,
                    metrics=_beside("metrics", serving.metrics, shard),
                    http=_beside("http", serving.http, shard),
                ),
            )
        )
    return made


def _has_own_state(server: Server, shards: int) -> bool:
    return shards > 1 and any(server.state_dir.glob("snapshot*.safetensors"))


def _beside(name: str, text: str | None, shard: int) -> str | None:
    """Return the address of a shard's view, that of the first being `text`."""
    if text is None or shard == 0:
        return text
    where = view_address(name, text)
    return str(where.with_port(where.port + shard if where.port else 0))


def run_shards(servers: Sequence[Server], say: Callable[[str], None]) -> None:
    """Run several servers until told to stop, or until one has ended, which ends the others.

    Makes their state directories first, all of them: they say how many shards the run has. Where
    none of them came to hold any state, those that it made go again at the end.

    say: told on one line where they listen once all do, and then of each view. For the main thread.
    Raises click.UsageError and click.ClickException, which name the shard.
    """
    context = multiprocessing.get_context("spawn")
    processes: list[SpawnProcess] = []
    pipes: list[Connection] = []
    ended = _NOTHING
    made: list[Path] = []
    try:
        with exit_on_sigterm():
            for server in servers:
                made += _make(server.state_dir)
            for server in servers:
                receiving, sending = context.Pipe(duplex=False)
                process = context.Process(target=_run_shard, args=(server, sending))
                process.start()
                sending.close()
                processes.append(process)
                pipes.append(receiving)
            ended = _follow(pipes, say)
    except (KeyboardInterrupt, SystemExit):
        pass
    finally:
        with signals_ignored():
            for process in processes:
                process.terminate()
            for process in processes:
                process.join()
            _remove_unused(made, [server.state_dir for server in servers])
    if ended.kind == _WRONG:
        raise click.UsageError(f"shard {ended.shard}: {ended.text}", click.get_current_context())
    if ended.kind == _ERROR:
        raise click.ClickException(f"shard {ended.shard}: {ended.text}")
    for shard, process in enumerate(processes):
        # one that was told to end before it could listen to that has nothing to save
        if process.exitcode not in (0, -signal.SIGTERM):
            raise click.ClickException(f"shard {shard} {_ending(process.exitcode)}")


def _make(folder: Path) -> list[Path]:
    """Make a folder and its parents where they are missing; return those, the outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"state directory {folder}: {error}") from error
    return missing[::-1]


def _remove_unused(made: Sequence[Path], state_dirs: Sequence[Path]) -> None:
    """Remove what this start has made, unless any shard has state: all of them belong to it."""
    with ExitStack() as held:
        try:
            for folder in state_dirs:
                if any(path.name != _LOCK for path in folder.iterdir()):
                    return
                if (folder / _LOCK).exists():
                    # another start may have found the folder, and have it now
                    lock = held.enter_context((folder / _LOCK).open("r+b"))
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for folder in reversed(made):
                (folder / _LOCK).unlink(missing_ok=True)
                folder.rmdir()
        except OSError as error:
            _log.debug("the folders of %d shards are left: %s", len(state_dirs), error)


class _Told(NamedTuple):
    """A line that a shard tells of itself; an empty one at its end."""

    shard: int
    kind: str
    text: str


_NOTHING = _Told(-1, "", "")


def _follow(pipes: Sequence[Connection], say: Callable[[str], None]) -> _Told:
    """Tell of the servers until one of them fails, or ends; return which."""
    addresses = [""] * len(pipes)
    views: list[str] = []
    while True:
        ready = wait(pipes)
        for shard, pipe in enumerate(pipes):
            if pipe not in ready:
                continue
            try:
                told = _Told(shard, *pipe.recv())
            except EOFError:
                return _Told(shard, "", "")
            if told.kind in (_ERROR, _WRONG):
                return told
            if told.kind != _ADDRESS:
                views.append(f"{told.kind} at {told.text}")
                continue
            addresses[shard] = told.text
            if all(addresses):
                say(f"listening on {in_one_name(addresses)}")
        while all(addresses) and views:
            say(views.pop(0))


def _run_shard(server: Server, pipe: Connection) -> None:
    """Run a server in a process of its own, which ends with the one that has started it."""
    # the parent, which hears it as well, has each of us end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        server.run(lambda name, text: pipe.send((name, text)))
    except click.ClickException as error:
        wrong = isinstance(error, click.UsageError)
        pipe.send((_WRONG if wrong else _ERROR, error.format_message()))
        sys.exit(error.exit_code)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _ending(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}, and the others were ended"
    return f"ended with exit code {exit_code}"


@contextmanager
def signals_ignored() -> Iterator[None]:
    """Let the block, which ends what has been told to end, run to its own end.

    A supervisor may say so again, and takes the rest with it once this process is gone.
    """
    before = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Take SIGTERM as an order to exit 0, until the server has a better answer to it.

    The kernel would withhold it from the first process of a container, which has no handler.
    """

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(0)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

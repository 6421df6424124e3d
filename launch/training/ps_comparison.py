"""The parameter server's part of a comparison: its checks, its workers, and what they bring."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from torch import nn

from training.checkpoint import CheckpointError, check_files, latest, step_of
from training.connection import WORKER_PLACE, Connection, without_variables
from training.local_server import ServerError, local_server, serve_arguments
from training.options import Comparison, Training
from training.ps_run import OWN_KEYS, SHARED_KEYS
from training.result import Result
from training.resume import checkpoint_folder, checkpoint_to_resume, run_config, server_folder
from training.running_server import check_servers
from training.torchrun import run_ranks
from training.worker_options import worker_name

WORKER = Path(__file__).parents[1] / "ps_worker.py"


def check_workers(options: Comparison, model: nn.Module) -> Training:
    """Return the options of the workers, resumed if they ask for it and have pushed anything.

    Raises CheckpointError, and ServerUnfitError for a running server that cannot be used.
    """
    training = options.training
    workers = [worker_name(rank) for rank in range(options.ranks)]
    if options.connection is not None:
        for worker in workers:
            check_servers(options.connection, worker, training)
    if training.checkpoint is None:
        return training
    folders = {name: checkpoint_folder(training.checkpoint, "ps", name) for name in workers}
    newest = {name: latest(folder) for name, folder in folders.items()}
    lacking = [folders[name] for name, path in newest.items() if path is None]
    server = server_folder(training.checkpoint)
    if len(lacking) == len(workers) and server.exists():
        raise CheckpointError(
            f"{server} is there without a checkpoint of any worker: "
            f"remove {server.parent} to begin anew, or give another folder"
        )
    if lacking:
        if any(path is not None and step_of(path) > 0 for path in newest.values()):
            raise CheckpointError(f"expected a checkpoint in {lacking[0]}, as the others have")
        # a worker has a checkpoint before it pushes: nothing was trained yet
        return replace(training, resume=False)
    config = run_config(training, "ps", options.ranks, model)
    for folder in folders.values():
        path = checkpoint_to_resume(training, folder, config)
        if path is not None:
            check_files(path, 1, shared=SHARED_KEYS, own=OWN_KEYS)
    return training


def train_on_server(options: Comparison, training: Training) -> Result:
    """Run the workers, and a server where none is running; return the first worker's result.

    Raises RankError, ServerError. Whatever happens, no process outlives the call.
    """
    if training.checkpoint is not None and not training.resume:
        # left by a run in which nothing was trained: check_workers has seen to that
        shutil.rmtree(training.checkpoint / "ps", ignore_errors=True)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="topq-")))
        state_dir = scratch / "server"
        if training.checkpoint is not None:
            state_dir = server_folder(training.checkpoint)
            state_dir.parent.mkdir(parents=True, exist_ok=True)
        link = options.connection
        if link is None:
            address = stack.enter_context(local_server(serve_arguments(options, state_dir)))
            link = Connection(servers=(address,))
        # what is meant for one worker alone, or for a server, is not for these workers
        kept = without_variables(os.environ)
        for name in os.environ.keys() - kept.keys():
            del os.environ[name]
        run_ranks(
            options.ranks,
            [
                str(WORKER),
                *training.arguments("ps"),
                *link.arguments(),
                "--result",
                str(scratch / f"{WORKER_PLACE}.json"),
            ],
            log_dir=str(scratch / "log"),
        )
        results = [
            Result.read(scratch / f"{worker_name(rank)}.json") for rank in range(options.ranks)
        ]
    sums = {result.parameters_sha256 for result in results}
    if len(sums) > 1:
        raise ServerError(
            "the workers ended with different parameters: "
            + ", ".join(result.parameters_sha256[:12] for result in results),
            1,
        )
    return results[0]

"""A comparison: what is checked before any process starts, and the runs, one after the other."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from training import ddp_run
from training.checkpoint import (
    check_files,
    checkpoint_folder,
    checkpoint_to_resume,
    latest,
    run_config,
    server_folder,
    step_of,
)
from training.data import load_data
from training.errors import CheckpointError, DataError, ServerUnfitError, fail
from training.models import build_model
from training.processes import ServerError, local_server, run_ranks, without_variables
from training.report import Result
from training.settings import (
    COMPARE,
    LINK_TITLES,
    MODE_NAMES,
    WORKER_PLACE,
    Comparison,
    Connection,
    Mode,
    Training,
    worker_name,
)

TRAIN = Path(__file__).parents[1] / "train.py"
WORKER = Path(__file__).parents[1] / "ps_worker.py"


def check(options: Comparison) -> dict[Mode, Training]:
    """Return the options of each mode's run, and say what they are.

    Exits with 2 and one line where they cannot work, before any process starts.
    """
    training = options.training
    try:
        data = load_data(training.data, training.data_dir)
    except DataError as error:
        fail(COMPARE, error)
    step_samples = options.ranks * training.batch_size
    if step_samples > len(data.train_inputs):
        fail(
            COMPARE,
            f"--batch-size {training.batch_size} on --ranks {options.ranks}: expected at most "
            f"the {len(data.train_inputs)} training samples of {data.name} a step",
        )
    with torch.device("meta"):
        model = build_model(data)
    try:
        trainings = {mode: _training_of(options, mode, model) for mode in options.modes}
    except (CheckpointError, ServerUnfitError) as error:
        fail(COMPARE, error)
    if training.resume and not any(start.resume for start in trainings.values()):
        fail(
            COMPARE,
            f"--resume with --checkpoint {training.checkpoint}: "
            f"expected a checkpoint of {' or '.join(options.modes)} there, found none",
        )
    for folder in filter(None, (options.out, training.checkpoint)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(COMPARE, f"{folder}: expected a folder to write to: {error.strerror}")
        if not os.access(folder, os.W_OK | os.X_OK):
            fail(COMPARE, f"{folder}: expected a folder to write to: permission denied")
    print(
        f"{data.name}: {len(data.train_inputs):,} training and {len(data.test_inputs):,} test "
        f"samples; {sum(p.numel() for p in model.parameters()):,} parameters\n"
        f"{options.ranks} ranks of {training.batch_size} samples; {training.inner_opt}, "
        f"lr {training.lr:g} {training.lr_schedule}; {training.steps} steps; seed {training.seed}"
        + (f"; q {training.q:g}" if options.modes != ("dense",) else "")
        + _link_words(training)
        + _server_words(options),
        flush=True,
    )
    return trainings


def _training_of(options: Comparison, mode: Mode, model: nn.Module) -> Training:
    """Return the options of one mode, resumed if they ask for it and there is a checkpoint."""
    if mode == "ps":
        return check_workers(options, model)
    training = options.training
    if training.checkpoint is None:
        return training
    folder = checkpoint_folder(training.checkpoint, mode)
    if training.resume:
        # stopped in the first of two modes, there is nothing to resume the second from
        training = replace(training, resume=latest(folder) is not None)
    config = run_config(training, mode, options.ranks, model)
    newest = checkpoint_to_resume(training, folder, config)
    if newest is not None:
        # here, where one line can say which file it is, and not on some rank
        check_files(newest, options.ranks, shared=ddp_run.SHARED_KEYS, own=ddp_run.OWN_KEYS)
    return training


def check_workers(options: Comparison, model: nn.Module) -> Training:
    """Return the options of the workers, resumed if they ask for it and have pushed anything.

    Raises CheckpointError, and ServerUnfitError for a running server that cannot be used.
    """
    # not before a server takes part: a comparison of DDP alone needs no gRPC
    from training import ps_run

    training = options.training
    workers = [worker_name(rank) for rank in range(options.ranks)]
    if options.connection is not None:
        for worker in workers:
            ps_run.check_servers(options.connection, worker, training)
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
            check_files(path, 1, shared=ps_run.SHARED_KEYS, own=ps_run.OWN_KEYS)
    return training


def _link_words(training: Training) -> str:
    if training.link == "none":
        return ""
    return f"\n{LINK_TITLES[training.link]} links between the ranks, emulated (--link none: none)"


def _server_words(options: Comparison) -> str:
    if "ps" not in options.modes:
        return ""
    if options.connection is not None:
        return f"\nserver {', '.join(options.connection.servers)}"
    q = f" q {options.downlink_q:g}" if options.downlink == "topq" else ""
    return f"\nlocal server; downlink {options.downlink}{q}"


def train(options: Comparison, mode: Mode, training: Training) -> Result:
    """Train in one mode and return its result; raises RankError, ServerError."""
    verb = "resuming" if training.resume else "training with"
    print(f"{verb} {MODE_NAMES[mode]}", flush=True)
    file = options.out / f"{options.training.data}-{mode}.json"
    if mode == "ps":
        result = _train_on_server(options, training)
        result.write(file)
        return result
    with tempfile.TemporaryDirectory(prefix="topq-") as log_dir:
        run_ranks(
            options.ranks,
            [str(TRAIN), *training.arguments(mode), "--result", str(file)],
            log_dir=log_dir,
        )
    return Result.read(file)


def _train_on_server(options: Comparison, training: Training) -> Result:
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
        connection = options.connection
        if connection is None:
            address = stack.enter_context(local_server(_serve_arguments(options, state_dir)))
            connection = Connection(servers=(address,))
        # what is meant for one worker alone, or for a server, is not for these workers
        for name in os.environ.keys() - without_variables(os.environ).keys():
            del os.environ[name]
        run_ranks(
            options.ranks,
            [
                str(WORKER),
                *training.arguments("ps"),
                *connection.arguments(),
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


def _serve_arguments(options: Comparison, state_dir: Path) -> list[str]:
    """Return the command line of `topq serve` for a comparison, but for its address."""
    training = options.training
    words = ["--state-dir", str(state_dir), "--workers", str(options.ranks), "--mode", "sync"]
    words += ["--inner-opt", training.inner_opt, "--lr", str(training.lr)]
    words += ["--downlink", options.downlink]
    if options.downlink == "topq":
        words += ["--downlink-q", str(options.downlink_q)]
    return words


def last_checkpoint(options: Comparison) -> str:
    """Return the words for where a stopped comparison can be resumed from."""
    folder = options.training.checkpoint
    if folder is None:
        return "no checkpoint was asked for (--checkpoint DIR)"
    workers = [worker_name(rank) for rank in range(options.ranks)]
    newest = [
        latest(checkpoint_folder(folder, mode, worker))
        for mode in options.modes
        for worker in (workers if mode == "ps" else [None])
    ]
    names = [str(path) for path in newest if path is not None]
    if not names:
        return f"there is no checkpoint in {folder} yet"
    return f"go on with --resume from {' and '.join(names)}"

"""Trains with dense DDP and with top-Q gradients, one after the other, and compares the two.

Each is `torchrun --standalone --nproc-per-node RANKS launch/train.py ...`, or ps_worker.py beside a
parameter server, with torchrun called within this process: one signal to it, from a terminal or a
supervisor, ends everything.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from training.connection import ServerUnfitError
from training.local_server import ServerError
from training.options import Comparison, Mode, Training, fail, parse_comparison
from training.result import MODE_NAMES, Result
from training.torchrun import RankError, Stopped, end_on_signals, raise_on_signals, run_ranks
from training.worker_options import worker_name

if TYPE_CHECKING:
    # torch takes 2 s to import: --help and a wrong option need not wait for it
    from torch import nn

PROGRAM = "train.sh"
TRAIN = Path(__file__).with_name("train.py")


def main() -> None:
    end_on_signals(PROGRAM)
    options = parse_comparison()
    # as torchrun itself would have it, without its warning
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        trainings = check(options)
        raise_on_signals()
        results = [_train(options, mode, training) for mode, training in trainings.items()]
        _report(options, results)
    except (RankError, ServerError) as error:
        if error.exit_code == 2:
            # bad input that only a rank, or the server, could see: it has said so itself
            sys.exit(2)
        sys.stderr.write(f"\n{PROGRAM}: {error}; {_last_checkpoint(options)}\n")
        sys.exit(1)
    except Stopped as stopped:
        sys.stderr.write(f"\n{PROGRAM}: {stopped}; {_last_checkpoint(options)}\n")
        sys.stderr.flush()
        # torchrun's rendezvous threads may not end when asked to
        os._exit(stopped.exit_code)


def check(options: Comparison) -> dict[Mode, Training]:
    """Return the options of each mode's run, and say what they are.

    Exits with 2 and one line where they cannot work, before any process starts.
    """
    import torch
    from training.checkpoint import CheckpointError
    from training.data import DataError, load_data
    from training.models import build_model

    training = options.training
    try:
        data = load_data(training.data, training.data_dir)
    except DataError as error:
        fail(PROGRAM, error)
    step_samples = options.ranks * training.batch_size
    if step_samples > len(data.train_inputs):
        fail(
            PROGRAM,
            f"--batch-size {training.batch_size} on --ranks {options.ranks}: expected at most "
            f"the {len(data.train_inputs)} training samples of {data.name} a step",
        )
    with torch.device("meta"):
        model = build_model(data)
    try:
        trainings = {mode: _start(options, mode, model) for mode in options.modes}
    except (CheckpointError, ServerUnfitError) as error:
        fail(PROGRAM, error)
    if training.resume and not any(start.resume for start in trainings.values()):
        fail(
            PROGRAM,
            f"--resume with --checkpoint {training.checkpoint}: "
            f"expected a checkpoint of {' or '.join(options.modes)} there, found none",
        )
    for folder in filter(None, (options.out, training.checkpoint)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(PROGRAM, f"{folder}: expected a folder to write to: {error.strerror}")
        if not os.access(folder, os.W_OK | os.X_OK):
            fail(PROGRAM, f"{folder}: expected a folder to write to: permission denied")
    print(
        f"{data.name}: {len(data.train_inputs):,} training and {len(data.test_inputs):,} test "
        f"samples; {sum(p.numel() for p in model.parameters()):,} parameters\n"
        f"{options.ranks} ranks of {training.batch_size} samples; {training.inner_opt}, "
        f"lr {training.lr:g} {training.lr_schedule}; {training.steps} steps; seed {training.seed}"
        + (f"; q {training.q:g}" if options.modes != ("dense",) else "")
        + _server_words(options),
        flush=True,
    )
    return trainings


def _server_words(options: Comparison) -> str:
    if "ps" not in options.modes:
        return ""
    if options.connection is not None:
        return f"\nserver {', '.join(options.connection.servers)}"
    q = f" q {options.downlink_q:g}" if options.downlink == "topq" else ""
    return f"\nlocal server; downlink {options.downlink}{q}"


def _start(options: Comparison, mode: Mode, model: nn.Module) -> Training:
    """Return the options of one mode, resumed if they ask for it and there is a checkpoint."""
    from training.checkpoint import check_files, latest
    from training.ddp_run import OWN_KEYS, SHARED_KEYS
    from training.resume import checkpoint_folder, checkpoint_to_resume, run_config

    if mode == "ps":
        from training.ps_comparison import check_workers

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
        check_files(newest, options.ranks, shared=SHARED_KEYS, own=OWN_KEYS)
    return training


def _train(options: Comparison, mode: Mode, training: Training) -> Result:
    verb = "resuming" if training.resume else "training with"
    print(f"{verb} {MODE_NAMES[mode]}", flush=True)
    file = options.out / f"{options.training.data}-{mode}.json"
    if mode == "ps":
        from training.ps_comparison import train_on_server

        result = train_on_server(options, training)
        result.write(file)
        return result
    with tempfile.TemporaryDirectory(prefix="topq-") as log_dir:
        run_ranks(
            options.ranks,
            [str(TRAIN), *training.arguments(mode), "--result", str(file)],
            log_dir=log_dir,
        )
    return Result.read(file)


def _report(options: Comparison, results: Sequence[Result]) -> None:
    from rich.console import Console
    from training.report import draw, print_table

    print_table(results, Console())
    on_server = [result for result in results if result.mode == "ps"]
    picture = options.out / f"{options.training.data}{'-ps' if on_server else ''}.png"
    draw(results, picture)
    for result in on_server:
        print(f"parameters sha256: {result.parameters_sha256}")
    if not on_server:
        sums = ", ".join(f"{MODE_NAMES[r.mode]} {r.parameters_sha256[:12]}..." for r in results)
        print(f"parameters sha256: {sums}")
    print(f"loss over steps and over bytes: {picture} (all figures: *.json beside it)")


def _last_checkpoint(options: Comparison) -> str:
    from training.checkpoint import latest
    from training.resume import checkpoint_folder

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


if __name__ == "__main__":
    main()

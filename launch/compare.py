"""Trains with dense DDP and with top-Q gradients, one after the other, and compares the two.

Each is `torchrun --standalone --nproc-per-node RANKS launch/train.py ...`, or ps_worker.py beside a
parameter server, with torchrun called within this process: one signal to it, from a terminal or a
supervisor, ends everything.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from training.options import parse_comparison
from training.processes import ProcessError, Stopped, end_on_signals, raise_on_signals
from training.report import Result, draw, print_table
from training.settings import COMPARE, MODE_NAMES, Comparison
from training.speed import speed_lines, target_accuracy


def main() -> None:
    end_on_signals(COMPARE)
    options = parse_comparison()
    # as torchrun itself would have it, without its warning
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # torch takes 2 s to import: --help and a wrong option need not wait for it
    from training import comparison

    try:
        trainings = comparison.check(options)
        raise_on_signals()
        results = [
            comparison.train(options, mode, training) for mode, training in trainings.items()
        ]
        _report(options, results)
    except ProcessError as error:
        if error.exit_code == 2:
            # bad input that only a rank, or the server, could see: it has said so itself
            sys.exit(2)
        sys.stderr.write(f"\n{COMPARE}: {error}; {comparison.last_checkpoint(options)}\n")
        sys.exit(1)
    except Stopped as stopped:
        sys.stderr.write(f"\n{COMPARE}: {stopped}; {comparison.last_checkpoint(options)}\n")
        sys.stderr.flush()
        # torchrun's rendezvous threads may not end when asked to
        os._exit(stopped.exit_code)


def _report(options: Comparison, results: Sequence[Result]) -> None:
    from rich.console import Console

    print_table(results, Console(), target_accuracy(results))
    for line in speed_lines(results):
        print(line)
    on_server = [result for result in results if result.mode == "ps"]
    picture = options.out / f"{options.training.data}{'-ps' if on_server else ''}.png"
    draw(results, picture)
    for result in on_server:
        print(f"parameters sha256: {result.parameters_sha256}")
    if not on_server:
        sums = ", ".join(f"{MODE_NAMES[r.mode]} {r.parameters_sha256[:12]}..." for r in results)
        print(f"parameters sha256: {sums}")
    print(f"loss over bytes and accuracy over time: {picture} (all figures: *.json beside it)")


if __name__ == "__main__":
    main()

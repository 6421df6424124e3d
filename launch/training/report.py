"""The table and the picture that a comparison ends with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from training.options import Mode
from training.result import MODE_NAMES, Result

# top-Q is drawn over dense, which stays to be seen where the two agree
STYLES: dict[Mode, dict[str, Any]] = {
    "dense": {"color": "#6f8fb5", "linewidth": 3.0},
    "topq": {"color": "#b3263e", "linewidth": 1.3},
    "ps": {"color": "#b3263e", "linewidth": 1.3},
}


def human_bytes(count: float) -> str:
    """Return a number of bytes with a decimal unit, three digits of it."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def ratio(dense_bytes: int, moved_bytes: int) -> float:
    """Return how many times fewer bytes than dense DDP were moved; inf where none were."""
    return dense_bytes / moved_bytes if moved_bytes else float("inf")


def print_table(results: Sequence[Result], console: Console) -> None:
    """Print a row a mode; where a server took part, what came back and what took time as well."""
    on_server = [result for result in results if result.mode == "ps"]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    headings = ["test accuracy", "test loss", "sent a rank", "fewer bytes", "train time"]
    if on_server:
        headings = ["accuracy", "loss", "sent", "fewer", "received", "fewer", "time"]
    for heading in headings:
        table.add_column(heading, justify="right")
    for result in results:
        counts = [result.sent_bytes]
        if on_server and result.received_bytes is not None:
            counts.append(result.received_bytes)
        table.add_row(
            MODE_NAMES[result.mode],
            f"{100 * result.test_accuracy:.2f} %",
            f"{result.test_loss:.3f}",
            *(
                cell
                for count in counts
                for cell in (
                    human_bytes(count[-1]),
                    f"{ratio(result.dense_bytes, count[-1]):.1f} x",
                )
            ),
            f"{result.train_s:.1f} s",
        )
    console.print(table)
    for result in on_server:
        console.print(
            f"{MODE_NAMES[result.mode]}: selected and encoded for {result.select_s:.1f} s, "
            f"waited for {result.wait_s:.1f} s"
        )


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw the training loss over steps and over bytes into a PNG file.

    The bytes are those that a rank sent; where a server took part, those received on top.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    first = results[0]
    window = max(1, first.steps // 50)
    figure, (by_step, by_bytes) = plt.subplots(
        1, 2, figsize=(11, 4.5), sharey=True, layout="constrained"
    )
    both_ways = any(result.mode == "ps" for result in results)
    every_loss = []
    for result in results:
        losses = _running_mean(result.losses, window)
        every_loss += losses
        label = MODE_NAMES[result.mode] + (f", q = {result.q:g}" if result.q is not None else "")
        style = {**STYLES[result.mode], "label": label}
        by_step.plot(range(1, len(losses) + 1), losses, **style)
        moved_bytes = result.sent_bytes
        if both_ways and result.received_bytes is not None:
            moved_bytes = [
                sum(both) for both in zip(moved_bytes, result.received_bytes, strict=True)
            ]
        by_bytes.plot(moved_bytes, losses, **style)
        by_bytes.annotate(
            human_bytes(moved_bytes[-1]),
            (moved_bytes[-1], losses[-1]),
            xytext=(0, -6),
            textcoords="offset points",
            horizontalalignment="center",
            verticalalignment="top",
            color=style["color"],
        )
    by_step.set_yscale("log")
    # a range of little more than a decade has too few powers of ten to read a value off
    decades = max(every_loss) / max(min(every_loss), 1e-12)
    by_step.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 100 else (1.0,)))
    by_step.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
    by_step.yaxis.set_minor_formatter(NullFormatter())
    by_step.margins(y=0.14)
    by_step.set_xlabel("step")
    by_step.set_ylabel(f"training loss (nats, mean of {window} steps)")
    by_step.legend()
    what = "sent and received" if both_ways else "sent"
    by_bytes.set_xlabel(f"bytes {what} by each rank so far")
    by_bytes.set_xscale("log")
    by_bytes.margins(x=0.08)
    by_bytes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: human_bytes(count)))
    for axes in (by_step, by_bytes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{first.data}: {first.ranks} ranks, {first.inner_opt}, lr {first.lr:g}, seed {first.seed}"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and up to window - 1 before it."""
    return [
        sum(values[max(0, end - window) : end]) / min(end, window)
        for end in range(1, len(values) + 1)
    ]

"""The result of a training run: its JSON file, and the table and the picture of several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.settings import LINK_TITLES, MODE_NAMES, LinkName, Mode

if TYPE_CHECKING:
    from rich.console import Console

# top-Q is drawn over dense, which stays to be seen where the two agree
STYLES: dict[Mode, dict[str, Any]] = {
    "dense": {"color": "#6f8fb5", "linewidth": 3.0},
    "topq": {"color": "#b3263e", "linewidth": 1.3},
    "ps": {"color": "#b3263e", "linewidth": 1.3},
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One finished training run, as one rank saw it: rank 0, or any worker of a server.

    losses: that rank's training loss in nats, one a step. sent_bytes: handed to collectives, or
    pushed, by a rank up to and including each step. received_bytes: what an all-reduce returned,
    or a server sent; None where nobody counts it. select_s and wait_s: None for dense.
    train_s has neither tests nor checks in it, but held_s, the waits for an emulated link.
    accuracies: (after so many seconds of training, accuracy on some of the test samples).
    """

    mode: Mode
    data: str
    ranks: int
    q: float | None
    inner_opt: str
    lr: float
    batch_size: int
    seed: int
    steps: int
    parameters: int
    parameters_sha256: str
    test_accuracy: float
    test_loss: float
    dense_bytes: int
    select_s: float | None
    wait_s: float | None
    train_s: float
    link: LinkName
    held_s: float
    accuracies: list[tuple[float, float]]
    losses: list[float]
    sent_bytes: list[int]
    received_bytes: list[int] | None

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read what `write` wrote."""
        return cls(**json.loads(path.read_bytes()))

    def seconds_to(self, accuracy: float) -> float | None:
        """Return after how many seconds of training it was tested as this good; None for never."""
        return next((after_s for after_s, found in self.accuracies if found >= accuracy), None)

    def write(self, path: Path) -> None:
        """Write to a JSON file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


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


def print_table(results: Sequence[Result], console: Console, target: float | None) -> None:
    """Print a row a mode; where a server took part, what came back and what took time as well.

    target: an accuracy to which the time is shown.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    on_server = [result for result in results if result.mode == "ps"]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    headings = ["test accuracy", "sent a rank", "fewer bytes", "time"]
    if on_server:
        headings = ["accuracy", "sent", "fewer", "received", "fewer", "time"]
    if target is not None:
        headings.append(f"to {100 * target:.1f} %")
    for heading in headings:
        table.add_column(heading, justify="right")
    for result in results:
        counts = [result.sent_bytes]
        if on_server and result.received_bytes is not None:
            counts.append(result.received_bytes)
        table.add_row(
            MODE_NAMES[result.mode],
            f"{100 * result.test_accuracy:.2f} %",
            *(
                cell
                for count in counts
                for cell in (
                    human_bytes(count[-1]),
                    f"{ratio(result.dense_bytes, count[-1]):.1f} x",
                )
            ),
            f"{result.train_s:.1f} s",
            *([] if target is None else [_seconds(result.seconds_to(target))]),
        )
    console.print(table)
    for result in on_server:
        console.print(
            f"{MODE_NAMES[result.mode]}: selected and encoded for {result.select_s:.1f} s, "
            f"waited for {result.wait_s:.1f} s"
        )


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw the training loss over steps and bytes, and accuracy over time, into a PNG file.

    The bytes are those that a rank sent; where a server took part, those received on top.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    first = results[0]
    window = max(1, first.steps // 50)
    figure, (by_step, by_bytes, by_time) = plt.subplots(
        1, 3, figsize=(15, 4.5), layout="constrained"
    )
    by_bytes.sharey(by_step)
    by_bytes.tick_params(labelleft=False)
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
            (moved_bytes[-1], min(losses)),
            xytext=(0, -6),
            textcoords="offset points",
            horizontalalignment="center",
            verticalalignment="top",
            color=style["color"],
        )
        by_time.plot(
            [after_s for after_s, _ in result.accuracies],
            [100 * accuracy for _, accuracy in result.accuracies],
            **style,
        )
    by_step.set_yscale("log")
    # a range of little more than a decade has too few powers of ten to read a value off
    decades = max(every_loss) / max(min(every_loss), 1e-12)
    by_step.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 100 else (1.0,)))
    by_step.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
    by_step.yaxis.set_minor_formatter(NullFormatter())
    by_step.margins(y=0.14)
    # room for the bytes below the curves
    by_step.set_ylim(bottom=0.7 * min(every_loss))
    by_step.set_xlabel("step")
    by_step.set_ylabel(f"training loss (nats, mean of {window} steps)")
    by_step.legend()
    what = "sent and received" if both_ways else "sent"
    by_bytes.set_xlabel(f"bytes {what} by each rank so far")
    by_bytes.set_xscale("log")
    by_bytes.margins(x=0.08)
    by_bytes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: human_bytes(count)))
    by_time.set_xlabel("seconds of training" + _link_words(first))
    by_time.set_ylabel("test accuracy (%)")
    by_time.set_xscale("log")
    by_time.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
    for axes in (by_step, by_bytes, by_time):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{first.data}: {first.ranks} ranks, {first.inner_opt}, lr {first.lr:g}, seed {first.seed}"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _link_words(result: Result) -> str:
    return "" if result.link == "none" else f", {LINK_TITLES[result.link]} links emulated"


def _seconds(duration_s: float | None) -> str:
    return "never" if duration_s is None else f"{duration_s:.1f} s"


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and up to window - 1 before it."""
    return [
        sum(values[max(0, end - window) : end]) / min(end, window)
        for end in range(1, len(values) + 1)
    ]

"""When each mode got where dense ends, and on which links dense would have been the faster one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from training.link import moved_bytes
from training.report import Result
from training.settings import LINK_TITLES, MODE_NAMES

# below dense's own accuracy at its end, which goes up and down by as much from one test to the next
ALLOWED_BELOW = 0.005


def target_accuracy(results: Sequence[Result]) -> float | None:
    """Return the accuracy that counts as dense's; None where dense was not tested on its way."""
    for result in results:
        if result.mode == "dense" and result.accuracies:
            return result.accuracies[-1][1] - ALLOWED_BELOW
    return None


def break_even_bits_per_s(dense: Result, sparse: Result) -> float:
    """Return the rate of the links on which both take as long for a step; inf where none is."""
    computed_s = [(result.train_s - result.held_s) / result.steps for result in (dense, sparse)]
    moved = [
        moved_bytes(
            result.mode,
            result.ranks,
            result.sent_bytes[-1] / result.steps,
            (result.received_bytes or [0])[-1] / result.steps,
        )
        for result in (dense, sparse)
    ]
    longer_s, fewer_bytes = computed_s[1] - computed_s[0], moved[0] - moved[1]
    return 8 * fewer_bytes / longer_s if longer_s > 0 else math.inf


def speed_lines(results: Sequence[Result]) -> list[str]:
    """Return the sentences that end a comparison of dense with another mode."""
    dense = next((result for result in results if result.mode == "dense"), None)
    others = [result for result in results if result.mode != "dense"]
    if dense is None or not others:
        return []
    lines = []
    if dense.link != "none":
        lines.append(
            f"Links of {LINK_TITLES[dense.link]} were emulated: each exchange waited as long as "
            "its bytes take."
        )
    target = target_accuracy(results)
    for other in others:
        name = MODE_NAMES[other.mode]
        if target is not None:
            lines.append(_sooner(name, target, dense, other))
        rate = break_even_bits_per_s(dense, other)
        lines.append(
            f"Dense is the faster one on links beyond {human_rate(rate)}."
            if math.isfinite(rate)
            else f"{name} was faster even without a link between the ranks."
        )
    return lines


def _sooner(name: str, target: float, dense: Result, other: Result) -> str:
    goal = f"{100 * target:.1f} %, what dense ends with less half a point"
    dense_s, other_s = dense.seconds_to(target), other.seconds_to(target)
    if dense_s is None or other_s is None:
        return f"{name} did not get to {goal}."
    ratio = dense_s / max(other_s, 1e-9)
    if ratio >= 1:
        return f"{name} got to {goal}, {ratio:.1f} times sooner."
    return f"{name} got to {goal}, {1 / ratio:.1f} times later."


def human_rate(bits_per_s: float) -> str:
    """Return a rate with a decimal unit, two digits of it."""
    for unit in ("bit", "kbit", "Mbit"):
        if bits_per_s < 995:
            return f"{bits_per_s:.2g} {unit}" if bits_per_s < 99.5 else f"{bits_per_s:.0f} {unit}"
        bits_per_s /= 1000
    return f"{bits_per_s:.2g} Gbit"

"""Which stretches of a flat vector are cut to their top-Q part, where one q holds for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from topq_dist.compress.compressor import at_least_one
from topq_dist.compress.cuts import Cut
from topq_dist.topq import check_fraction

Scope = Literal["parameter", "bucket"]


def check_scope(scope: Scope) -> Scope:
    """Return `scope` where it is one; raises ValueError."""
    if scope not in get_args(Scope):
        raise ValueError(f"scope={scope!r}: expected one of {', '.join(get_args(Scope))}")
    return scope


def uniform_cuts(numels: Sequence[int], *, q: float, scope: Scope) -> list[Cut]:
    """Return the cuts of a flat vector of tensors of these sizes, one a tensor or one for all.

    At least one element of each is kept unless q is 1, so that no bias is left behind for good.
    """
    check_fraction("q", q)
    if check_scope(scope) == "bucket":
        numels = [sum(numels)]
    cuts, start = [], 0
    for numel in numels:
        cuts.append(Cut(start=start, rows=1, row_numel=numel, kept=at_least_one(q, numel)))
        start += numel
    return cuts

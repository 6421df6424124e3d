"""Ranks that hold other shards of the same model: what all of them must know and decide alike.

Those of one shard, the replicas, have a group of their own, in which frames travel; each of them is
also in one with the other shards of its replica. What all of a row and then all of a column have
agreed on, all ranks have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist

from topq_dist.compress.coherence import Coherence, total
from topq_dist.exchange.agreement import (
    ExchangeError,
    check_alike,
    check_same_on_all_ranks,
    digest,
    gather_texts,
    tell_of_failure,
)
from topq_dist.exchange.collectives import CommContext

_FAILED = "failed: "
_FINE = "fine"


def check_same_on_all_shards(text: str, context: CommContext, *, of_shard: str = "") -> None:
    """Return when every replica of every shard has the same `text`; a collective of them all.

    of_shard: what replicas of one shard must have alike, and the other shards need not.

    Raises ExchangeError on every rank, quoting the first line in which two differ. Without shards
    this is `check_same_on_all_ranks`.
    """
    try:
        check_same_on_all_ranks(text + of_shard, group=context.group, device=context.device)
    except ExchangeError as error:
        _tell_shards(error, context)
        raise
    if context.shards is not None:
        texts = gather_texts(text, group=context.shards, device=context.device)
        _raise_what_failed(texts)
        check_alike(texts, kind="shard")


@contextmanager
def telling_of_failures(context: CommContext) -> Iterator[None]:
    """Tell the other ranks of an error in the block, which wait for this one to agree.

    On those it takes the place of `check_same_on_all_shards`.
    """
    try:
        yield
    except Exception as error:
        tell_of_failure(error, group=context.group, device=context.device)
        _tell_shards(error, context)
        raise


class Outcome(NamedTuple):
    """What has come of a step: whether it counts, and the sum of what was measured."""

    finite: bool
    coherence: Coherence


def agree_on_outcome(mine: Outcome, settings: Callable[[], str], context: CommContext) -> Outcome:
    """Return what has come of a step on all shards; a collective of the shards, if there are any.

    mine: the same on all replicas of this shard. settings: returns what all must have alike.
    Raises ExchangeError on every rank where a shard has failed or has other settings.
    """
    if context.shards is None:
        return mine
    row = [0.0, float(mine.finite), float(digest(settings())), *mine.coherence]
    rows = _gather_rows(row, context)
    if any(theirs[2] != row[2] for theirs in rows):
        texts = gather_texts(settings(), group=context.shards, device=context.device)
        check_alike(texts, kind="shard")
    return Outcome(
        finite=all(bool(finite) for _, finite, *_ in rows),
        coherence=total(Coherence(*sums) for _, _, _, *sums in rows),
    )


def tell_of_failed_step(error: Exception, context: CommContext) -> None:
    """Take the place of `norm_over_shards` or `agree_on_outcome` on a failed shard's replicas."""
    if context.shards is not None:
        _gather_numbers([1.0, 0.0, 0.0, 0.0, 0.0], context)
        _tell_shards(error, context)


def norm_over_shards(norm: float, context: CommContext) -> float:
    """Return the norm of a vector of which each shard has this norm of its part; a collective.

    Raises ExchangeError on every rank where a shard has failed before it knew its norm.
    """
    if context.shards is None:
        return norm
    rows = _gather_rows([0.0, norm, 0.0, 0.0, 0.0], context)
    return float(torch.linalg.vector_norm(torch.tensor([row[1] for row in rows]).double()))


def _tell_shards(error: Exception, context: CommContext) -> None:
    if context.shards is not None:
        gather_texts(f"{_FAILED}{error}", group=context.shards, device=context.device)


def _raise_what_failed(texts: list[str]) -> None:
    for shard, text in enumerate(texts):
        if text.startswith(_FAILED):
            raise ExchangeError(f"on the ranks of shard {shard}: {text.removeprefix(_FAILED)}")


def _gather_rows(row: list[float], context: CommContext) -> list[list[float]]:
    """Return each shard's row of a step; raises ExchangeError where the first number of one is 1.

    Rows of all that is agreed on in a step are of one length: a shard that has failed cannot know
    in which of them the others are.
    """
    rows = _gather_numbers(row, context)
    if context.shards is not None and any(failed for failed, *_ in rows):
        _raise_what_failed(gather_texts(_FINE, group=context.shards, device=context.device))
    return rows


def _gather_numbers(numbers: list[float], context: CommContext) -> list[list[float]]:
    """Return each shard's numbers, in the order of shards: added up so, all have the same bits."""
    if context.shards is None:
        return [numbers]
    mine = torch.tensor(numbers, dtype=torch.float64, device=context.device)
    rows = torch.empty((context.shards.size(), len(numbers)), dtype=mine.dtype, device=mine.device)
    with context.meter.timed("wait_s"):
        dist.all_gather(list(rows.unbind()), mine, group=context.shards)
        gathered: list[list[float]] = rows.tolist()
    return gathered

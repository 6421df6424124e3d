"""The exchanges by name."""

from __future__ import annotations

import os
from typing import Literal, get_args

from topq_dist.compress.compressor import FlatCompressor
from topq_dist.exchange.allgather import AllGather
from topq_dist.exchange.auto import TRIAL_STEPS, Auto
from topq_dist.exchange.base import Exchange, Link
from topq_dist.exchange.dense import Dense
from topq_dist.exchange.hierarchical import Hierarchical
from topq_dist.exchange.split_reduce import SplitReduce

ExchangeName = Literal["auto", "allgather", "split", "hierarchical", "dense"]


def check_exchange(name: ExchangeName, link: Link, ranks_per_node: int | None) -> int:
    """Return the ranks a node, 1 but for "hierarchical"; raise unless this can be made."""
    if name not in get_args(ExchangeName):
        known = ", ".join(get_args(ExchangeName))
        raise ValueError(f"exchange={name!r}: expected one of {known}")
    if name == "hierarchical":
        per_node = _ranks_per_node(ranks_per_node)
        if isinstance(per_node, bool) or not isinstance(per_node, int):
            raise TypeError(f"ranks_per_node={per_node!r}: expected an integer")
        if per_node < 1 or link.size % per_node:
            raise ValueError(
                f"ranks_per_node={per_node}: expected a divisor of the {link.size} ranks"
            )
        return per_node
    if ranks_per_node is not None:
        raise ValueError(
            f"ranks_per_node={ranks_per_node} with exchange={name!r}: expected None, since only "
            "exchange='hierarchical' knows nodes"
        )
    return 1


def make_exchange(
    name: ExchangeName, link: Link, compressor: FlatCompressor, per_node: int
) -> Exchange:
    """Return the exchange of this name; "hierarchical" makes process groups, a collective."""
    if name == "allgather":
        return AllGather(link)
    if name == "split":
        return SplitReduce(link, compressor)
    if name == "dense":
        return Dense(link, compressor)
    if name == "hierarchical":
        return Hierarchical(link, per_node)
    candidates: dict[str, Exchange] = {"allgather": AllGather(link)}
    if compressor.error_feedback:
        # with two ranks a split sends as much, in twice as many messages
        if link.size > 2:
            candidates["split"] = SplitReduce(link, compressor)
        # a trial is no reason to pay what is owed: that is for when it is chosen
        candidates["dense"] = Dense(link, compressor, unpaid_steps=TRIAL_STEPS)
    return Auto(link, candidates)


def _ranks_per_node(ranks_per_node: int | None) -> int:
    if ranks_per_node is not None:
        return ranks_per_node
    if "LOCAL_WORLD_SIZE" not in os.environ:
        raise ValueError(
            "ranks_per_node=None without LOCAL_WORLD_SIZE, which torchrun sets: expected a number"
        )
    return int(os.environ["LOCAL_WORLD_SIZE"])

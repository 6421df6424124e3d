"""The exchanges by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal, NamedTuple, assert_never, get_args

from topq_dist.compress.compressor import TopKCompressor
from topq_dist.exchange.allgather import AllGather
from topq_dist.exchange.auto import Auto
from topq_dist.exchange.base import Exchange
from topq_dist.exchange.collectives import CommContext
from topq_dist.exchange.dense import Dense
from topq_dist.exchange.hierarchical import Hierarchical
from topq_dist.exchange.split_reduce import SplitReduce


class DeviceOptions(NamedTuple):
    """How frames are exchanged on the device; see DeviceAllGather."""

    late: bool


ExchangeName = Literal["auto", "allgather", "split", "hierarchical", "dense"]


def check_exchange(name: ExchangeName, ranks_per_node: int | None) -> int:
    """Return the ranks a node, 1 but for "hierarchical"; raise for what no ranks can make."""
    if name not in get_args(ExchangeName):
        known = ", ".join(get_args(ExchangeName))
        raise ValueError(f"exchange={name!r}: expected one of {known}")
    if name == "hierarchical":
        per_node = _ranks_per_node(ranks_per_node)
        if isinstance(per_node, bool) or not isinstance(per_node, int):
            raise TypeError(f"ranks_per_node={per_node!r}: expected an integer")
        if per_node < 1:
            raise ValueError(f"ranks_per_node={per_node}: expected a number of ranks above zero")
        return per_node
    if ranks_per_node is not None:
        raise ValueError(
            f"ranks_per_node={ranks_per_node} with exchange={name!r}: expected None, since only "
            "exchange='hierarchical' knows nodes"
        )
    return 1


def check_ranks(per_node: int, size: int) -> None:
    """Raise ValueError unless so many ranks make up whole nodes."""
    if size % per_node:
        raise ValueError(f"ranks_per_node={per_node}: expected a divisor of the {size} ranks")


def make_exchange(
    name: ExchangeName,
    context: CommContext,
    compressor: TopKCompressor,
    per_node: int,
    *,
    on_device: DeviceOptions | None = None,
) -> Exchange:
    """Return the exchange of this name; "hierarchical" makes process groups, a collective.

    on_device: have the frames of "allgather", among those of "auto" too, stay on the device of
        `context`.
    """
    if name == "allgather":
        return _all_gather(context, compressor, on_device)
    if name == "split":
        return SplitReduce(context, compressor)
    if name == "dense":
        return Dense(context, compressor)
    if name == "hierarchical":
        return Hierarchical(context, compressor, per_node)
    if name != "auto":
        assert_never(name)
    exchanges = _candidates(context, lambda: compressor, on_device)
    # a rehearsal is over before anybody could hear of it late
    rehearsed = None if on_device is None else DeviceOptions(late=False)
    return Auto(context, exchanges, _candidates(context, compressor.anew, rehearsed))


def _all_gather(
    context: CommContext, compressor: TopKCompressor, on_device: DeviceOptions | None
) -> Exchange:
    if on_device is None:
        return AllGather(context, compressor)
    # imports triton, which not every machine has
    from topq_dist.compress.device_compressor import DeviceCompressor
    from topq_dist.exchange.device_gather import DeviceAllGather

    return DeviceAllGather(
        context, DeviceCompressor(compressor, context.device), late=on_device.late
    )


def _candidates(
    context: CommContext,
    compressor: Callable[[], TopKCompressor],
    on_device: DeviceOptions | None,
) -> dict[str, Exchange]:
    """Return what "auto" chooses from, each with what `compressor` returns."""
    candidates = {"allgather": _all_gather(context, compressor(), on_device)}
    if candidates["allgather"].compressor.error_feedback:
        # with two ranks a split sends as much, in twice as many messages
        if context.size > 2:
            candidates["split"] = SplitReduce(context, compressor())
        candidates["dense"] = Dense(context, compressor())
    return candidates


def _ranks_per_node(ranks_per_node: int | None) -> int:
    if ranks_per_node is not None:
        return ranks_per_node
    if "LOCAL_WORLD_SIZE" not in os.environ:
        raise ValueError(
            "ranks_per_node=None without LOCAL_WORLD_SIZE, which torchrun sets: expected a number"
        )
    return int(os.environ["LOCAL_WORLD_SIZE"])

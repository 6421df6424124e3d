"""How long collectives take on the link between the ranks of a group, measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from topq_dist.advice.time_model import MeasuredLink

_SMALLEST_BYTES = 64
_LARGEST_BYTES = 1 << 26
_GROWTH = 8
# beyond a size that takes as long, time goes by bytes
_LONG_S = 0.25
_REPEATS = 5
_FEW_REPEATS = 3
_LONGEST_PAUSE_S = 0.2


def measure_link(
    largest_bytes: Mapping[str, int],
    *,
    group: dist.ProcessGroup,
    device: torch.device,
    pause_s: float,
) -> MeasuredLink:
    """Return how long collectives take, each up to the bytes given; a collective of the group.

    A collective is torch's name and a dtype, as "all_reduce float32". Each size is the median of
    several, on the slowest rank, each after a pause as long as the step's compute: many links let
    pass at once what has been saved up in between.
    """
    return MeasuredLink(
        points={
            collective: _points(collective, largest, group, device, min(pause_s, _LONGEST_PAUSE_S))
            for collective, largest in sorted(largest_bytes.items())
        }
    )


def slowest(
    values: Sequence[float], *, group: dist.ProcessGroup, device: torch.device
) -> list[float]:
    """Return for each place the largest of all ranks' values; a collective of the group."""
    numbers = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(numbers, dist.ReduceOp.MAX, group=group)
    agreed: list[float] = numbers.tolist()
    return agreed


def _points(
    collective: str, largest: int, group: dist.ProcessGroup, device: torch.device, pause_s: float
) -> list[tuple[int, float]]:
    points: list[tuple[int, float]] = []
    nbytes = _SMALLEST_BYTES
    while True:
        long = bool(points) and points[-1][1] > _LONG_S / _GROWTH
        repeats = _FEW_REPEATS if long else _REPEATS
        once = _Once(collective, nbytes, group, device)
        took_s = [once.seconds(pause_s) for _ in range(1 + repeats)]
        (median_s,) = slowest([statistics.median(took_s[1:])], group=group, device=device)
        points.append((nbytes, median_s))
        if len(points) > 1 and (nbytes >= min(largest, _LARGEST_BYTES) or median_s > _LONG_S):
            return points
        nbytes = max(min(nbytes * _GROWTH, largest), nbytes + _SMALLEST_BYTES)


class _Once:
    """A collective to which each rank hands so many bytes."""

    def __init__(
        self, collective: str, nbytes: int, group: dist.ProcessGroup, device: torch.device
    ) -> None:
        self._kind, dtype_name = collective.split()
        self._group = group
        self._device = device
        self._size = group.size()
        dtype = getattr(torch, dtype_name)
        numel = max(self._size, nbytes // dtype.itemsize)
        self._given = torch.zeros(numel, dtype=dtype, device=device)
        received = self._size if self._kind == "all_gather" else 1
        self._received = torch.empty((received, numel), dtype=dtype, device=device)

    def seconds(self, pause_s: float) -> float:
        """Return how long it takes on this rank, all of which begin it together."""
        time.sleep(pause_s)
        dist.all_reduce(torch.zeros(1, device=self._device), group=self._group)
        self._synchronize()
        began_s = time.perf_counter()
        self._run()
        self._synchronize()
        return time.perf_counter() - began_s

    def _run(self) -> None:
        given, group = self._given, self._group
        if self._kind == "all_reduce":
            dist.all_reduce(given, group=group)
        elif self._kind == "all_gather":
            dist.all_gather(list(self._received.unbind()), given, group=group)
        elif self._kind == "broadcast":
            dist.broadcast(given, dist.get_global_rank(group, 0), group=group)
        elif self._kind == "all_to_all":
            share = given.numel() // (self._size - 1)
            sizes = [0 if rank == group.rank() else share for rank in range(self._size)]
            flat = given[: share * (self._size - 1)]
            dist.all_to_all_single(
                self._received[0, : flat.numel()], flat, sizes, sizes, group=group
            )
        else:
            raise ValueError(f"collective={self._kind!r}: expected one that a method has used")

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

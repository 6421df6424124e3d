"""A process group whose other members are mirrors of this one, joined by a link without delay.

What a step takes among them is its compute and what the exchange computes; what it would put on a
link is noted down.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from topq_dist.advice.time_model import Traffic


class MirrorGroup(dist.ProcessGroup):
    """Rank 0 of `size`, of which each other rank hands over what this one does.

    All-gathers, all-reduces (which leave what they are given) and broadcasts. backend: what
    torch.distributed.get_backend says. `leave` it when done.
    """

    def __init__(self, size: int, *, backend: str) -> None:
        super().__init__(0, size)  # type: ignore[call-arg]
        self._under_way: list[MirrorWork] = []
        self._calls: dict[str, list[int]] = defaultdict(list)
        # seconds in what real members would do while this one does the same
        self.aside_s = 0.0
        # torch's collectives look up what new_group would have entered
        world = distributed_c10d._world
        world.pg_map[self] = (backend, dist.HashStore())
        world.pg_names[self] = f"topq/mirror/{id(self)}"  # type: ignore[assignment]
        world.pg_group_ranks[self] = {rank: rank for rank in range(size)}

    def leave(self) -> None:
        """Forget the group."""
        world = distributed_c10d._world
        world.pg_map.pop(self, None)
        world.pg_names.pop(self, None)
        world.pg_group_ranks.pop(self, None)
        self._under_way.clear()

    def take_traffic(self) -> tuple[Traffic, ...]:
        """Return what has been handed over since the last call, by collective."""
        calls, self._calls = self._calls, defaultdict(list)
        self._under_way.clear()
        return tuple(Traffic(name, len(calls[name]), sum(calls[name])) for name in sorted(calls))

    def note(self, kind: str, dtype: torch.dtype, handed_bytes: int) -> None:
        """Note down a collective."""
        self._calls[f"{kind} {str(dtype).removeprefix('torch.')}"].append(handed_bytes)

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        return "mirror"

    def allreduce(self, *arguments: Any, **named: Any) -> Any:
        return self._as_given("all_reduce", arguments[0])

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        for output, given in zip(outputs, inputs, strict=True):
            for copy in output:
                copy.copy_(given)
        return self._work("all_gather", inputs, outputs)

    def broadcast(self, *arguments: Any, **named: Any) -> Any:
        return self._as_given("broadcast", arguments[0])

    def _as_given(self, kind: str, tensors: Tensor | list[Tensor]) -> Any:
        given = [tensors] if isinstance(tensors, Tensor) else tensors
        return self._work(kind, given, given)

    def _work(self, kind: str, tensors: Sequence[Tensor], result: Any) -> Any:
        self.note(kind, tensors[0].dtype, sum(tensor.nbytes for tensor in tensors))
        work = MirrorWork(result, [tensors[0].device] if tensors[0].is_cuda else [])
        # torch's own side holds none
        self._under_way.append(work)
        return work


class MirrorWork(dist._Work):
    """A collective that is over."""

    def __init__(self, result: Any, devices: list[int | str | torch.device]) -> None:
        super().__init__()
        self._future: torch.futures.Future[Any] = torch.futures.Future(devices=devices)
        self._future.set_result(result)

    def is_completed(self) -> bool:
        return True

    def wait(self, timeout: Any = None) -> bool:
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        return self._future

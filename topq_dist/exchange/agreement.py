"""Agreement between ranks: the same settings on all of them, and failures that all are told of."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist

_FAILED = "could not make its part:"


class ExchangeError(RuntimeError):
    """Ranks disagree, or one of them failed; raised on every rank of the group."""


class SettingsDifferError(ExchangeError):
    """Some ranks compressed with other settings than rank 0; every rank sees the same list."""


def digest(text: str) -> int:
    """Return 32 bits that differ, as good as surely, where two ranks' settings differ."""
    return zlib.crc32(text.encode())


def gather_texts(text: str, *, group: dist.ProcessGroup, device: torch.device) -> list[str]:
    """Return each rank's `text`, in rank order; a collective that all ranks must call."""
    mine = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)
    size = group.size()
    lengths = torch.empty((size, 1), dtype=torch.int64, device=device)
    dist.all_gather(
        list(lengths.unbind()), torch.tensor([mine.numel()], device=device), group=group
    )
    longest = int(lengths.max())
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: mine.numel()] = mine
    gathered = torch.empty((size, longest), dtype=torch.uint8, device=device)
    dist.all_gather(list(gathered.unbind()), padded, group=group)
    return [
        bytes(row[: int(length)].numpy().data).decode()
        for row, length in zip(gathered.cpu(), lengths, strict=True)
    ]


def tell_of_failure(error: Exception, *, group: dist.ProcessGroup, device: torch.device) -> None:
    """Take the place of `check_same_on_all_ranks` on a rank that has failed.

    No other rank then waits for this one.
    """
    gather_texts(f"{_FAILED} {error}", group=group, device=device)


def check_same_on_all_ranks(text: str, *, group: dist.ProcessGroup, device: torch.device) -> None:
    """Return when every rank of `group` has the same `text`; a collective that all must call.

    Raises ExchangeError on every rank, quoting the first line in which two ranks differ.
    """
    texts = gather_texts(text, group=group, device=device)
    for rank, other in enumerate(texts):
        if other.startswith(_FAILED):
            raise ExchangeError(f"rank {rank} {other}")
    check_alike(texts)


def check_alike(texts: Sequence[str], *, kind: str = "rank") -> None:
    """Raise ExchangeError, quoting the first difference, unless these texts of ranks are one.

    kind: what the place of a text in the sequence is the number of.
    """
    for number, other in enumerate(texts):
        if other != texts[0]:
            first, second = _first_difference(texts[0], other)
            raise ExchangeError(
                f"ranks disagree: {kind} 0 has {first!r}, {kind} {number} has {second!r}; "
                "expected the same settings and the same model on every rank"
            )


def _first_difference(one: str, other: str) -> tuple[str, str]:
    lines, others = one.split("\n"), other.split("\n")
    shorter = min(len(lines), len(others))
    at = next((i for i in range(shorter) if lines[i] != others[i]), shorter)
    end = "nothing more"
    return lines[at] if at < len(lines) else end, others[at] if at < len(others) else end

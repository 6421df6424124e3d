"""Frames of different lengths between every two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from topq_dist.exchange.agreement import ExchangeError, SettingsDifferError
from topq_dist.exchange.collectives import AllToAllLanes, CommContext, FrameAllToAll
from topq_dist.telemetry import Meter

pytestmark = pytest.mark.gloo
RANKS = 3


def length_of(step: int, sender: int, receiver: int) -> int:
    """Lengths that grow, shrink, and now and then are 0."""
    return (997 * step * (sender + 1) + 3511 * receiver * (step + 2)) % (4_000 if step % 4 else 97)


def frame_of(step: int, sender: int, receiver: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * sender + receiver)
    numel = length_of(step, sender, receiver)
    return torch.randint(0, 256, (numel,), dtype=torch.uint8, generator=generator)


def swapping(rank: int) -> dict[str, object]:
    group = dist.group.WORLD
    assert group is not None
    lanes, meter = AllToAllLanes.among(RANKS), Meter()

    def swap(frames: list[Tensor] | None, settings_digest: int = 7) -> list[Tensor]:
        swapped = FrameAllToAll(
            frames,
            lanes,
            CommContext(group=group, device=torch.device("cpu"), meter=meter),
            settings_digest=settings_digest,
        )
        return swapped.frames()

    arrived = True
    for step in range(12):
        frames = swap([frame_of(step, rank, peer) for peer in range(RANKS)])
        for peer, frame in enumerate(frames):
            arrived &= torch.equal(frame, frame_of(step, peer, rank))
    result: dict[str, object] = {"arrived": arrived}
    same = [torch.full((10_000,), rank, dtype=torch.uint8)] * RANKS
    for _ in range(3):
        before = meter.stats.wire_bytes
        swap(same)
        result["wire_bytes"] = meter.stats.wire_bytes - before
    for case, kind in (("fails", ExchangeError), ("differs", SettingsDifferError)):
        frames_or_none = None if case == "fails" and rank == 1 else same
        with pytest.raises(kind, match="rank 1"):
            swap(frames_or_none, settings_digest=7 + (case == "differs" and rank == 1))
    return result


def test_every_frame_arrives_and_every_rank_hears_of_a_failure(tmp_path: Path) -> None:
    for result in run_ranks(RANKS, swapping, tmp_path):
        assert result["arrived"]
        # two frames, with a head and some room each
        assert 20_000 < result["wire_bytes"] < 1.06 * 20_000 + 200

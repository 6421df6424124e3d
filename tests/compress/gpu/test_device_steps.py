"""Steps by Triton's kernels, interpreted: in each stage the same bits as on the CPU."""

from __future__ import annotations

import pytest
import torch
from gpu_cases import DTYPES, Rank, check_step, compare
from interpreted import DEVICE
from torch import Tensor

from topq_dist.compress.gpu.frames import (
    Written,
    check_frames,
    read_frames,
    slot_bytes,
    write_frame,
)
from topq_dist.compress.gpu.memory import Arena
from topq_dist.compress.gpu.select import DeviceSelection, DeviceSelector
from topq_dist.compress.gpu.shape import FORMATS, FrameShape
from topq_dist.compress.gpu.update import DeviceSelected, finish
from topq_dist.compress.sparsify.segments import Segment, Segments, uniform_segments
from topq_dist.dtypes import accumulate_dtype

NUMELS = [700, 1, 300]
SEGMENTS = uniform_segments(NUMELS, q=0.9, scope="parameter")
NUMEL = sum(NUMELS)
ON = torch.device(DEVICE)
SHAPE = FrameShape(numel=NUMEL, ks=SEGMENTS.table[:, 3], value_format="int4", device=ON)


def drawn(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed)).to(dtype)


def written(arena: Arena, found: DeviceSelection, slot: Tensor, digest: int) -> Written:
    with arena.borrow(ON) as scratch:
        return write_frame(
            found,
            SHAPE,
            None,
            slot,
            scratch,
            has_residual=True,
            settings_digest=digest,
            coherence=torch.zeros(2, dtype=torch.float64, device=ON),
        )


def test_random_vectors_give_the_bits_of_the_cpu() -> None:
    assert compare(10, seed=1, most=6000) > 2


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_of_every_dtype(fmt: str) -> None:
    arena = Arena()
    for number, dtype in enumerate(DTYPES):
        bound = 1.0 if number % 2 else None
        rank = Rank(arena, drawn(1).to(accumulate_dtype(dtype)))
        assert check_step([rank], [drawn(2, dtype)], SEGMENTS, fmt, bound, None, arena)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_half_precision_has_no_number_for(dtype: torch.dtype, ranks: int) -> None:
    arena = Arena()
    tiny = 1e-12 if dtype == torch.float16 else 1e-42
    every = [Rank(arena, drawn(seed) * tiny) for seed in range(ranks)]
    nothing = [torch.zeros(NUMEL, dtype=dtype) for _ in every]
    assert check_step(every, nothing, SEGMENTS, "fp32", None, None, arena)


def test_a_frame_without_room_leaves_everything_in_the_residual() -> None:
    arena = Arena()
    ranks = [Rank(arena, drawn(seed)) for seed in (1, 2)]
    for step in range(2):
        gradients = [drawn(10 + step), drawn(20 + step)]
        before = [rank.residual.clone() for rank in ranks if rank.residual is not None]
        assert check_step(ranks, gradients, SEGMENTS, "fp16", 1.0, 40 + 400 * step, arena)
        for rank, gradient, kept in zip(ranks, gradients, before, strict=True):
            assert rank.device_residual is not None
            assert torch.equal(rank.device_residual.cpu(), kept + gradient) == (step == 0)


def test_damaged_frames_are_reported_and_change_nothing() -> None:
    arena = Arena()
    gradient, residual = drawn(1).to(ON), drawn(2).to(ON)
    found = DeviceSelector(arena).select(gradient, residual, SEGMENTS)
    slot = torch.zeros(slot_bytes(SHAPE), dtype=torch.uint8, device=ON)
    mine = written(arena, found, slot, 5)
    length = 32 + int(mine.plan[2])
    generator = torch.Generator().manual_seed(3)
    for _ in range(12):
        slots = slot.repeat(2, 1)
        at = int(torch.randint(32, length, (1,), generator=generator))
        slots[1, at] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        report = torch.zeros(2, dtype=torch.int64, device=ON)
        bucket, kept = gradient.clone(), residual.clone()
        with arena.borrow(ON) as scratch:
            received = read_frames(
                slots, SHAPE, check_frames(slots, SHAPE, report), report, scratch
            )
            selected = DeviceSelected(bucket, kept, found, SHAPE, None)
            finish(selected, mine, received, report, scratch, divisor=2)
        assert report.tolist()[0] == 0
        assert report.tolist()[1] & 8
        assert torch.equal(kept, residual)
        assert bool(bucket.isnan().all())


def test_what_a_slot_says_of_its_rank_is_reported() -> None:
    arena = Arena()
    found = DeviceSelector(arena).select(drawn(1).to(ON), None, SEGMENTS)
    slots = torch.zeros(3, slot_bytes(SHAPE), dtype=torch.uint8, device=ON)
    for slot, digest in zip(slots, (5, 6, 5), strict=True):
        written(arena, found, slot, digest)
    # a rank that has failed says so, and nothing else
    slots[2] = 0
    slots[2, 12] = 1
    report = torch.zeros(3, dtype=torch.int64, device=ON)
    check_frames(slots, SHAPE, report)
    assert report.tolist() == [0, 4, 2]


def test_rows_are_for_another_way() -> None:
    rows = Segments([Segment(start=0, rows=2, row_numel=5, k=1)])
    with pytest.raises(ValueError, match="expected one row each"):
        DeviceSelector(Arena()).select(torch.ones(10), None, rows)

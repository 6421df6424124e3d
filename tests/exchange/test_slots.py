"""Reusable buffers, which collectives use one after the other, and some at the same time."""

from __future__ import annotations

import pytest
import torch

from topq_dist.compress.coherence import NO_COHERENCE
from topq_dist.exchange.slots import ReusableBuffer, frame_in, pack, unpack

CPU = torch.device("cpu")


def test_what_is_in_flight_is_lent_to_no_other() -> None:
    buffer = ReusableBuffer()
    first, second = buffer.take(64, CPU), buffer.take(64, CPU)
    buffer.release(first)
    third = buffer.take(64, CPU)
    fourth = buffer.take(64, CPU)
    assert third.data_ptr() == first.data_ptr()
    assert len({one.data_ptr() for one in (second, third, fourth)}) == 3


def test_what_is_brought_back_is_used_again_with_all_its_room() -> None:
    buffer = ReusableBuffer()
    first = buffer.take(800, CPU)
    buffer.release(first.view(8, 100))
    smaller = buffer.take(16, CPU)
    buffer.release(smaller)
    assert smaller.data_ptr() == first.data_ptr()
    larger = buffer.take(900, CPU)
    assert larger.data_ptr() == first.data_ptr()
    assert larger.shape == (900,)
    buffer.release(larger)
    assert buffer.take(901, CPU).shape == (901,)


@pytest.mark.parametrize("frame_bytes", [None, 0, 100, 968, 5_000])
def test_behind_a_frame_a_slot_is_zero_whatever_the_memory_held(frame_bytes: int | None) -> None:
    row = torch.full((1_000,), 0x53, dtype=torch.uint8)
    frame = None if frame_bytes is None else torch.full((frame_bytes,), 7, dtype=torch.uint8)
    pack(row, frame, 0, coherence=NO_COHERENCE)
    head = unpack(row)
    assert (head.frame_bytes, head.failed) == (frame_bytes or 0, frame_bytes is None)
    held = frame_in(row, head)
    assert bool((held == 7).all())
    assert held.numel() == min(frame_bytes or 0, row.numel() - 32)
    assert not row[32 + held.numel() :].any()

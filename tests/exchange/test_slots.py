"""Reusable buffers, which collectives use one after the other, and some at the same time."""

from __future__ import annotations

import torch

from topq_dist.exchange.slots import ReusableBuffer

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

"""The pool has buffers back when nothing refers to them any more, and not before."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from topq_dist.ps.wire.buffer_pool import BufferPool, Bytes, _rounded_up

MB = 1 << 20


def address(array: Bytes) -> int:
    return array.ctypes.data


VIEWS: dict[str, Callable[[Bytes], Any]] = {
    "slice": lambda lent: lent[5:10],
    "memoryview": lambda lent: lent.data[MB:],
    "tensor": torch.from_numpy,
    "values": lambda lent: torch.from_numpy(lent[MB:].view(np.float32)),
    "from memoryview": lambda lent: np.frombuffer(lent.data[8:], dtype=np.uint8),
}


@pytest.mark.parametrize("view_of", VIEWS.values(), ids=VIEWS)
def test_a_buffer_comes_back_when_its_last_view_is_gone(view_of: Callable[[Bytes], Any]) -> None:
    buffers = BufferPool()
    lent = buffers.acquire(3 * MB)
    lent[:] = 7
    at = address(lent)
    view = view_of(lent)
    del lent
    assert buffers.idle_bytes == 0
    assert address(buffers.acquire(3 * MB)) != at
    assert bytes(np.asarray(view[:1]).data)[0] == 7
    del view
    assert buffers.idle_bytes == 6 * MB
    assert address(buffers.acquire(3 * MB)) == at


def test_two_that_are_lent_are_two() -> None:
    buffers = BufferPool()
    one, two = buffers.acquire(MB), buffers.acquire(MB)
    one[:], two[:] = 1, 2
    assert (one == 1).all()
    assert (two == 2).all()
    del one, two
    assert buffers.idle_bytes == 2 * MB
    three, four, five = (buffers.acquire(MB) for _ in range(3))
    assert len({address(three), address(four), address(five)}) == 3


@given(st.integers(0, 1 << 40))
def test_a_buffer_is_an_eighth_longer_at_most(size: int) -> None:
    assert size <= _rounded_up(size) <= size + size // 8


def test_sizes_that_differ_a_little_share_their_buffers() -> None:
    buffers = BufferPool()
    at = address(buffers.acquire(30 * MB + 12345))
    assert address(buffers.acquire(30 * MB + 23456)) == at
    assert buffers.acquire(30 * MB + 23456).shape == (30 * MB + 23456,)
    assert buffers.acquire(1000).shape == (1000,)
    assert buffers.acquire(0).shape == (0,)


def test_what_lies_idle_for_long_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = BufferPool(idle_limit_s=60)
    now_s = [time.monotonic()]
    monkeypatch.setattr("topq_dist.ps.wire.buffer_pool.time.monotonic", lambda: now_s[0])

    def rounds(count: int) -> None:
        for _ in range(count):
            held = [buffers.acquire(MB) for _ in range(3)]
            del held
            now_s[0] += 10

    crowd = [buffers.acquire(MB) for _ in range(10)]
    del crowd
    assert buffers.idle_bytes == 10 * MB
    rounds(20)
    assert buffers.idle_bytes == 3 * MB
    now_s[0] += 1000
    buffers.acquire(2 * MB)
    now_s[0] += 1000
    buffers.acquire(2 * MB)
    assert buffers.idle_bytes == 2 * MB


def test_threads_share_them() -> None:
    buffers = BufferPool()
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(50):
            lent = buffers.acquire(MB)
            lent[::4096] = number
            time.sleep(0)
            if not (lent[::4096] == number).all():
                wrong.append(number)
            del lent

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    gc.collect()
    assert wrong == []
    assert MB <= buffers.idle_bytes <= 4 * MB

"""The bytes that a step moves for each element, counted from the kernels' loads and stores."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from interpreted import DEVICE, LAUNCHES
from triton.runtime import interpreter

from topq_dist.compress.compressor import TopKCompressor
from topq_dist.compress.device_compressor import DeviceCompressor, slot_bytes
from topq_dist.compress.layout import Layout
from topq_dist.compress.sparsify.segments import uniform_segments

NUMEL, Q = 40_000, 0.99


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter counts")
def test_three_copies_and_little_for_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: Counter[str] = Counter()
    builder = interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        moved[LAUNCHES[-1].name] += int(mask.data.sum()) * pointers.get_element_ty().itemsize
        return load(pointers, mask, *rest)

    def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        moved[LAUNCHES[-1].name] += int(mask.data.sum()) * pointers.get_element_ty().itemsize
        return store(pointers, value, mask, *rest)

    device = torch.device(DEVICE)
    inner = TopKCompressor(value_format="int2", error_feedback=True, bound=1.0)
    compressor = DeviceCompressor(inner, device)
    layout = Layout(names=("w",), shapes=((NUMEL,),))
    segments = uniform_segments([NUMEL], q=Q, scope="parameter")
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        if step == 2:
            # the third step has a threshold, of the second
            monkeypatch.setattr(builder, "create_masked_load", counted_load)
            monkeypatch.setattr(builder, "create_masked_store", counted_store)
        selected = compressor.compress(
            torch.randn(NUMEL, generator=generator), layout, segments
        ).on_device
        assert selected is not None
        k = selected.shape.k
        slots = torch.zeros(1, slot_bytes(selected.shape), dtype=torch.uint8)
        report = torch.zeros(1, dtype=torch.int64)
        nothing = torch.zeros(2, dtype=torch.float64)
        written = compressor.write(selected, slots[0], 1, nothing)
        heads = compressor.check(selected, slots, report)
        compressor.finish(selected, written, slots, heads, report)
        assert report.tolist() == [0]
    # gradient and residual are read, then read once more, and both are written: three copies
    assert 8 * NUMEL <= moved["find_candidates"] < 8.5 * NUMEL
    assert 16 * NUMEL <= moved["take_up"] < 16.1 * NUMEL
    aside = sum(moved.values()) - 24 * NUMEL
    # for each element that is sent, and tables that stay in a cache, of which each block reads some
    assert aside < 1200 * k, (aside / k, moved)

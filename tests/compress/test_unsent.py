"""Residuals that wait, beside a plain account of every coordinate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from topq_dist.compress.compressor import TopKCompressor
from topq_dist.compress.layout import Layout
from topq_dist.compress.sparsify.segments import Segment
from topq_dist.compress.unsent import UnsentWatch


class Account:
    """A compressor that is watched, and the age of each of its coordinates."""

    def __init__(self, *numels: int) -> None:
        self.layouts = [Layout(names=(f"p{at}",), shapes=((n,),)) for at, n in enumerate(numels)]
        self.compressor = TopKCompressor(value_format="fp32", error_feedback=True)
        self.watch = UnsentWatch()
        self.ages = [torch.zeros(n, dtype=torch.int64) for n in numels]

    def step(self, gradients: list[Tensor], k: int, *, void: bool = False) -> float:
        """Go through a step, and return the norm of the residuals over that of the gradients."""
        held = [
            self.compressor.residuals.flat(layout, dtype=torch.float32, device=torch.device("cpu"))
            for layout in self.layouts
        ]
        ratio = math.hypot(*(float(r.norm()) for r in held)) / math.hypot(
            *(float(g.norm()) for g in gradients)
        )
        updates = []
        for layout, gradient in zip(self.layouts, gradients, strict=True):
            segment = Segment(start=0, rows=1, row_numel=layout.numel, k=k)
            update = self.compressor.compress(gradient, layout, [segment]).update
            assert update is not None
            self.watch.compressed(update)
            updates.append(update)
        if void:
            self.watch.void()
            return ratio
        for age, update in zip(self.ages, updates, strict=True):
            self.compressor.residuals.apply(update)
            age += 1
            age[update.indices] = 0
            age[update.residual == 0] = 0
        self.watch.applied(updates)
        return ratio


@pytest.mark.parametrize("numels", [(1000,), (40, 7, 1024), (1,)])
def test_the_oldest_of_few_coordinates_is_exact(numels: tuple[int, ...]) -> None:
    account = Account(*numels)
    for step in range(30):
        gradients = [torch.randn(n) for n in numels]
        gradients[0][: numels[0] // 2] = 0.0  # nothing to send, and so nothing that waits
        account.step(gradients, k=max(1, min(numels) // 30), void=step == 12)
        oldest = max(int(age.max()) for age in account.ages)
        if step != 12:
            assert account.watch.reading.oldest_steps == oldest


def test_the_oldest_of_many_is_at_most_what_it_is_and_not_far_from_it() -> None:
    account = Account(200_000)
    for _ in range(40):
        account.step([torch.randn(200_000)], k=2_000)
    oldest = int(account.ages[0].max())
    found = account.watch.reading.oldest_steps
    assert found is not None
    assert oldest - 5 <= found <= oldest


def test_the_ratio_is_of_every_tenth_step() -> None:
    account = Account(300, 500)
    ratios = [
        account.step([torch.randn(300), torch.randn(500)], k=5, void=step == 10)
        for step in range(22)
    ]
    # the void step has been done again, and is the tenth
    assert account.watch.reading.residual_ratio == pytest.approx(ratios[21])
    assert account.watch.reading.growing_steps == 0


def test_it_grows_where_next_to_nothing_is_sent_and_only_there() -> None:
    growing, keeping_up = Account(2_000), Account(2_000)
    for step in range(600):
        gradient = torch.randn(2_000, generator=torch.Generator().manual_seed(step))
        growing.step([gradient], k=1)
        keeping_up.step([gradient], k=200)
        if step == 530:
            assert growing.watch.reading.growing_steps == 450
    assert growing.watch.reading.growing_steps >= 500
    assert keeping_up.watch.reading.growing_steps < 300


def test_buckets_that_are_laid_out_anew_begin_anew() -> None:
    account = Account(50)
    for _ in range(9):
        account.step([torch.randn(50)], k=1)
    assert account.watch.reading.oldest_steps == 9
    account.layouts = [Layout(names=("p0", "more"), shapes=((50,), (10,)))]
    account.ages = [torch.zeros(60, dtype=torch.int64)]
    account.step([torch.randn(60)], k=1)
    assert account.watch.reading.oldest_steps == 1


def test_nothing_is_known_without_residuals() -> None:
    watch = UnsentWatch()
    watch.compressed(None)
    watch.applied([])
    assert watch.reading.residual_ratio is None
    assert watch.reading.oldest_steps is None

"""Every block of Python on the pages runs, or says why not."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
from page_blocks import PAGES, ROOT, blocks_of, plain_model, python_of, run_block, steps
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import topq_dist
from topq_dist.elastic import store


class Place(NamedTuple):
    """A page, and what its blocks run in."""

    page: str
    names: dict[str, Any]
    folder: Path

    def run(self, number: int, replaced: dict[str, str] | None = None) -> None:
        """Run the page's block of this number, from 0 on."""
        run_block(python_of(self.page)[number], self.names, replaced or {})


def with_hook_names(place: Place, *, wraps: bool) -> None:
    """Have what a script has by then: a model, in DistributedDataParallel if so, and AdamW."""
    model: nn.Module = DistributedDataParallel(plain_model()) if wraps else plain_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def your_loop() -> None:
        for _ in steps(place.names["model"]):
            place.names["optimizer"].step()

    place.names.update(
        {"torch": torch, "dist": dist, "os": os, "model": model, "optimizer": optimizer},
        DistributedDataParallel=DistributedDataParallel,
        your_loop=your_loop,
        **{name: getattr(topq_dist, name) for name in topq_dist.__all__},
    )


def with_hook(place: Place) -> None:
    with_hook_names(place, wraps=True)
    model, optimizer = place.names["model"], place.names["optimizer"]
    state = topq_dist.register_topq_hook(model, optimizer, exchange="allgather")
    place.names["state"] = state
    place.names["your_loop"]()


def readme(place: Place) -> None:
    with_hook_names(place, wraps=False)
    place.run(0)
    assert place.names["state"].stats().steps == 3


def advise(place: Place) -> None:
    with_hook_names(place, wraps=False)

    def loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(tokens), tokens)

    batches = itertools.cycle(torch.randint(0, 11, (2, 16)))
    place.names.update(batches=batches, loss=loss, build_model=plain_model)
    place.run(0)
    model, loss_of, _ = place.names["factory"]()
    assert loss_of(model).isfinite()
    few = "bandwidth_bits_per_s=1e9, qs=(0.9,), value_formats=('int2',), budget_s=0.1"
    place.run(1, {"next(batches)), optimizer)": f"next(batches)), optimizer, {few})"})
    assert place.names["advice"].world_size == 2


def density(place: Place) -> None:
    with_hook_names(place, wraps=True)
    place.run(0)
    place.names["your_loop"]()


def optimizers(place: Place) -> None:
    with_hook_names(place, wraps=True)
    place.run(0)
    place.names["your_loop"]()


def resuming(place: Place) -> None:
    with_hook(place)
    place.run(0)
    saved = place.names["state"].state_dict()
    with_hook(place)
    place.run(1)
    loaded = place.names["state"].state_dict()
    assert all(
        torch.equal(saved["residuals"][name], one) for name, one in loaded["residuals"].items()
    )


def local_steps(place: Place) -> None:
    with_hook_names(place, wraps=False)

    def loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(tokens), tokens)

    place.names.update(batches=torch.randint(0, 11, (10, 16)), loss=loss)
    place.run(0)
    assert place.names["steps"].stats().steps == 10


def elastic(place: Place) -> None:
    served = store.serve("127.0.0.1:0")
    os.environ["RANK"] = "0"
    replaced = {"10.0.0.1:29500": f"127.0.0.1:{served.port}", "ranks=3": "ranks=1", "10_000": "4"}
    with_hook_names(place, wraps=False)
    place.names["your_loop"] = lambda: next(steps(place.names["model"]))
    place.run(0, replaced)
    with_hook_names(place, wraps=False)
    again = store.serve("127.0.0.1:0")
    replaced["10.0.0.1:29500"] = f"127.0.0.1:{again.port}"
    # there is one already
    replaced['dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)'] = ""
    replaced["DistributedDataParallel(model),"] = "wrapped := DistributedDataParallel(model),"

    def your_loop() -> None:
        for _ in steps(place.names["wrapped"], 1):
            place.names["optimizer"].step()

    place.names["your_loop"] = your_loop
    place.run(1, replaced)
    assert place.names["state"].stats().steps == 4


def fsdp(place: Place) -> None:
    with_hook_names(place, wraps=False)
    place.names.update(replicas=1, shards=1, folder=str(place.folder / "checkpoint"))
    place.names["model"].blocks = ()
    place.run(0, {'"cuda"': '"cpu"'})
    place.run(1)
    place.run(2)


def metrics(place: Place) -> None:
    with_hook(place)
    place.names["rank"] = 0
    place.run(0, {"9500 + rank": "0", "\n...\n": "\n"})
    trackers = {name: MagicMock() for name in ("writer", "run", "mlflow")}
    place.names.update(trackers, step=3)
    place.run(1)
    assert all(tracker.method_calls for tracker in trackers.values())


ON_RANKS: dict[str, Callable[[Place], None]] = {
    "README.md": readme,
    "docs/advise.md": advise,
    "docs/density.md": density,
    "docs/elastic.md": elastic,
    "docs/fsdp.md": fsdp,
    "docs/local_steps.md": local_steps,
    "docs/metrics.md": metrics,
    "docs/optimizers.md": optimizers,
    "docs/resuming.md": resuming,
}
# by test_start.py and test_server_blocks.py
ELSEWHERE = {"docs/start.md", "docs/production.md", "docs/parameter_server.md"}


def test_every_page_with_python_is_run() -> None:
    pages = {str(page.relative_to(ROOT)) for page in PAGES}
    assert {page for page in pages if python_of(page)} == ON_RANKS.keys() | ELSEWHERE


def test_a_block_that_is_not_run_says_why() -> None:
    reasons = [block.reason for page in PAGES for block in blocks_of(page) if block.reason]
    assert all(len(reason.split()) > 3 for reason in reasons)


@pytest.mark.parametrize("page", ON_RANKS)
def test_blocks_run(
    page: str, alone: dist.ProcessGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    ran: list[int] = []

    class Counting(Place):
        def run(self, number: int, replaced: dict[str, str] | None = None) -> None:
            ran.append(number)
            super().run(number, replaced)

    ON_RANKS[page](Counting(page, {}, tmp_path))
    assert ran == list(range(len(python_of(page))))

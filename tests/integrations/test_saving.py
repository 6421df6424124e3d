"""The hook's state as a file of a checkpoint: whole or not there, and named where it is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hook_cases import loss_of, small_model
from torch.nn.parallel import DistributedDataParallel

from topq_dist import TopQState, register_topq_hook
from topq_dist.integrations.saving import load_state, save_state

pytestmark = pytest.mark.usefixtures("alone")


def hooked(*, steps: int) -> TopQState:
    model = DistributedDataParallel(small_model())
    state = register_topq_hook(model, momentum="optimizer", q=0.9, exchange="allgather")
    for step in range(steps):
        loss_of(model, step, 0).backward()  # type: ignore[no-untyped-call]
    return state


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    state, resumed = hooked(steps=3), hooked(steps=0)
    save_state(state, tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["topq_state.pt"]
    load_state(resumed, tmp_path / "new")
    saved, loaded = state.state_dict(), resumed.state_dict()
    assert saved["residuals"].keys() == loaded["residuals"].keys()
    for name, residual in saved["residuals"].items():
        assert torch.equal(residual, loaded["residuals"][name])
    assert resumed.stats().steps == 3


def test_a_checkpoint_without_the_hook_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"topq_state\.pt: .*saved without the hook"):
        load_state(hooked(steps=0), tmp_path)

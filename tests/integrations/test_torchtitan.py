"""torchtitan's Trainer in an environment of its own: the recipe, its checkpoint resumed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from trainer_recipes import check_file, check_hook_was_called, environment, example, run

pytestmark = [
    pytest.mark.gloo,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform != "linux", reason="torchtitan imports triton"),
]


def test_the_recipe_resumes_to_the_bit(tmp_path: Path) -> None:
    ranks = Path(__file__).with_name("torchtitan_ranks.py")
    said = run(environment("torchtitan"), ranks, example("torchtitan_hsdp.py"), tmp_path)
    whole, _, resumed = said.partition("resumed:")
    check_hook_was_called(whole, steps=20)
    check_hook_was_called(resumed, steps=10)
    losses = [float(loss) for loss in re.findall(r"loss: +([\d.]+)", whole)]
    assert len(losses) == 4 * 20
    assert losses[-1] < losses[0] / 2
    for name in ("whole", "resumed"):
        dcp_to_torch_save(tmp_path / name / "checkpoint" / "step-20", tmp_path / f"{name}.pt")
    places = "", "topq.replica0.residuals", "topq.replica1.residuals"
    check_file(tmp_path / "whole.pt", tmp_path / "resumed.pt", *places)

"""Accelerate in an environment of its own: the recipe, saved and resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from trainer_recipes import (
    check_file,
    check_hook_was_called,
    environment,
    example,
    ranks_with,
    run,
)

RANKS = ranks_with("accelerate", "topq_dist.integrations.accelerate")
pytestmark = [pytest.mark.gloo, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def python() -> Path:
    return environment("accelerate")


def test_the_recipe_resumes_to_the_bit(python: Path, tmp_path: Path) -> None:
    recipe = example("accelerate_ddp.py")
    said = run(python, *RANKS, recipe, tmp_path / "whole")
    check_hook_was_called(said, steps=128)
    shutil.copytree(tmp_path / "whole" / "epoch2", tmp_path / "resumed" / "epoch2")
    said = run(python, *RANKS, recipe, tmp_path / "resumed", "2")
    check_hook_was_called(said, steps=128)
    whole, resumed = (tmp_path / name / "epoch4" for name in ("whole", "resumed"))
    weights = "model.safetensors"
    assert (whole / weights).read_bytes() == (resumed / weights).read_bytes()
    check_file(whole / "optimizer.bin", resumed / "optimizer.bin")
    check_file(whole / "topq_state.pt", resumed / "topq_state.pt")

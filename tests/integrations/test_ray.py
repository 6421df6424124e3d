"""Ray Train in an environment of its own: a run whose workers fail ends as an undisturbed one.

A local Ray starts a dozen processes: it is run alone on the machine, by `pytest -m ray`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from trainer_recipes import check_file, check_hook_was_called, environment, example, run

pytestmark = [pytest.mark.gloo, pytest.mark.ray, pytest.mark.timeout(900)]


def last_checkpoint(folder: Path) -> Path:
    return max(folder.glob("topq/checkpoint_2*"))


def test_the_recipe_resumes_to_the_bit(tmp_path: Path) -> None:
    python, recipe = environment("ray"), example("ray_train.py")
    check_hook_was_called(run(python, recipe, tmp_path / "whole"), steps=128)
    said = run(python, recipe, tmp_path / "failed", "3")
    check_hook_was_called(said, steps=128)
    assert "a worker fails" in said
    whole, resumed = (last_checkpoint(tmp_path / name) for name in ("whole", "failed"))
    check_file(whole / "training.pt", resumed / "training.pt")
    check_file(whole / "topq_state.pt", resumed / "topq_state.pt")

"""Lightning's Trainer in an environment of its own: the recipe, and the doors beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
from trainer_recipes import check_file, check_hook_was_called, environment, example, run

pytestmark = [pytest.mark.gloo, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def python() -> Path:
    return environment("lightning")


def test_the_recipe_resumes_to_the_bit(python: Path, tmp_path: Path) -> None:
    recipe = example("lightning_ddp.py")
    said = run(python, recipe, tmp_path / "whole")
    check_hook_was_called(said, steps=128)
    resumed = run(python, recipe, tmp_path / "resumed", tmp_path / "whole/epoch=1.ckpt")
    check_hook_was_called(resumed, steps=128)
    whole, again = (tmp_path / name / "epoch=3.ckpt" for name in ("whole", "resumed"))
    check_file(whole, again, "state_dict", "optimizer_states", "callbacks.TopQCallback")


def test_a_state_handed_to_the_strategy_and_what_is_refused(python: Path, tmp_path: Path) -> None:
    said = run(python, Path(__file__).with_name("lightning_doors.py"), tmp_path)
    assert "all doors tried" in said

"""The Trainer of Transformers in an environment of its own: the recipe, saved and resumed."""

from __future__ import annotations

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

RANKS = ranks_with("transformers.trainer", "topq_dist.integrations.transformers")
pytestmark = [pytest.mark.gloo, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def python() -> Path:
    return environment("transformers")


def test_the_recipe_resumes_to_the_bit(python: Path, tmp_path: Path) -> None:
    recipe = example("transformers_trainer.py")
    folders = [tmp_path / name for name in ("whole", "resumed")]
    said = run(python, *RANKS, recipe, folders[0])
    check_hook_was_called(said, steps=80)
    half = folders[0] / "checkpoint-40"
    said = run(python, *RANKS, recipe, folders[1], half)
    check_hook_was_called(said, steps=80)
    whole, resumed = (folder / "checkpoint-80" for folder in folders)
    weights = "model.safetensors"
    assert (whole / weights).read_bytes() == (resumed / weights).read_bytes()
    check_file(whole / "optimizer.pt", resumed / "optimizer.pt")
    check_file(whole / "topq_state.pt", resumed / "topq_state.pt")


def test_which_checkpoint_is_resumed(python: Path, tmp_path: Path) -> None:
    said = run(python, *RANKS, Path(__file__).with_name("transformers_doors.py"), tmp_path)
    assert said.count("all doors tried") == 2

"""The command lines: what they default to, hand on, and refuse."""

import shlex

import pytest
import torch
from optimizers import OPTIMIZERS
from options import RECIPES, parse_comparison, parse_rank


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--q 1.5", ["--q", "'1.5'", "a number in [0, 1]"]),
        ("--q=-0.1", ["--q", "'-0.1'", "a number in [0, 1]"]),
        ("--q nan", ["--q", "'nan'", "a number in [0, 1]"]),
        ("--q much", ["--q", "'much'", "a number in [0, 1]"]),
        ("--data mnist", ["--data", "'mnist'", "digits, fashion-mnist, shakespeare"]),
        ("--inner-opt sdg", ["--inner-opt", "'sdg'", "adamw", "sgd"]),
        ("--inner-opt lbfgs", ["--inner-opt", "'lbfgs'", "adamw", "sgd"]),
        ("--lr 0", ["--lr", "'0'", "above 0"]),
        ("--lr inf", ["--lr", "'inf'", "above 0"]),
        ("--ranks 0", ["--ranks", "'0'", "at least 1"]),
        ("--ranks two", ["--ranks", "'two'", "at least 1"]),
        ("--steps 0", ["--steps", "'0'", "at least 1"]),
        ("--batch-size 0", ["--batch-size", "'0'", "at least 1"]),
        ("--seed=-1", ["--seed", "'-1'", "at least 0"]),
        ("--checkpoint-every 0 --checkpoint d", ["--checkpoint-every", "'0'", "at least 1"]),
        ("--checkpoint-every 7", ["--checkpoint-every 7", "without --checkpoint"]),
        ("--resume", ["--resume", "without --checkpoint"]),
        ("--dense-only --topq-only", ["--dense-only", "--topq-only", "one of them"]),
        ("--dense-only --q 0.5", ["--q 0.5", "without top-Q"]),
        ("--data-dir d", ["--data-dir d", "digits", "no --data-dir"]),
        ("--stepss 4", ["--stepss 4"]),
    ],
)
def test_bad_input_is_refused_in_one_line(
    line: str, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_comparison(shlex.split(line))
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for part in expected:
        assert part in message


def test_only_the_first_rank_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as exit_info:
        parse_rank(["--q", "7"])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("data", RECIPES)
def test_defaults_are_the_recipe_of_the_data_set(data: str) -> None:
    comparison = parse_comparison(["--data", data])
    training, recipe = comparison.training, RECIPES[data]
    assert (training.inner_opt, training.lr) == (recipe.inner_opt, recipe.lr)
    assert (training.steps, training.batch_size) == (recipe.steps, recipe.batch_size)
    assert (training.q, training.seed, comparison.ranks) == (0.99, 0, 2)
    assert comparison.modes == ("dense", "topq")


def test_another_optimizer_gets_a_learning_rate_that_fits_it() -> None:
    assert parse_comparison(["--inner-opt", "Adam"]).training.lr == 1e-3
    assert parse_comparison(["--data", "shakespeare", "--inner-opt", "NAdam"]).training.lr == 2e-3
    assert parse_comparison(["--inner-opt", "adam", "--lr", "0.5"]).training.lr == 0.5


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--q 0.1 --lr 3e-7 --inner-opt adamw",
        "--data shakespeare --data-dir 'a b' --steps 3 --batch-size 5 --seed 9",
        "--checkpoint c --checkpoint-every 4 --resume",
    ],
)
def test_the_ranks_get_the_options_of_the_comparison(line: str) -> None:
    training = parse_comparison(shlex.split(line)).training
    rank = parse_rank(training.arguments("topq"))
    assert rank.training == training
    assert rank.mode == "topq"


def test_dense_ranks_get_no_q() -> None:
    training = parse_comparison(["--q", "0.5", "--steps", "3"]).training
    rank = parse_rank(training.arguments("dense"))
    assert rank.mode == "dense"
    assert rank.training.steps == 3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_on_offer_trains_in_a_plain_loop(name: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()
    assert not torch.equal(model.weight, before)

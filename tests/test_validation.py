"""Checks of numbers name what they refuse."""

from __future__ import annotations

import math

import pytest

from topq_dist.validation import check_number, check_positive, warn_caller


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_what_is_not_above_zero_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="clip_norm="):
        check_positive("clip_norm", value)


def test_none_and_numbers_above_zero_pass() -> None:
    assert check_positive("clip_norm", None) is None
    assert check_positive("clip_norm", 0.5) == 0.5


def test_a_truth_value_is_no_number() -> None:
    with pytest.raises(TypeError, match="lr=True"):
        check_number("lr", True)


def test_a_warning_is_the_line_s_that_called_the_package() -> None:
    namespace: dict[str, object] = {"warn_caller": warn_caller, "__name__": "topq_dist.made_up"}
    exec("def inner():\n    warn_caller('said')\ndef outer():\n    inner()", namespace)  # noqa: S102
    with pytest.warns(UserWarning, match="said") as caught:
        namespace["outer"]()  # type: ignore[operator]
    assert caught[0].filename == __file__

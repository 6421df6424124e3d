"""The defaults of hook and worker, and the one that goes only with another."""

from __future__ import annotations

import pytest

from topq_dist.compress.defaults import (
    DEFAULT_BOUND,
    DEFAULT_VALUE_FORMAT,
    usual_bound,
    usual_value_format,
)
from topq_dist.compress.sparsify.bounding import check_bound


def test_only_the_default_bound_goes_with_the_error_feedback() -> None:
    assert usual_bound(DEFAULT_BOUND, error_feedback=True) == 1.0
    assert usual_bound(DEFAULT_BOUND, error_feedback=False) is None
    asked = usual_bound(1.0, error_feedback=False)
    with pytest.raises(ValueError, match=r"bound=1\.0 with error_feedback=False"):
        check_bound(asked, error_feedback=False)


def test_the_default_format_is_lossless_where_rounding_would_be_lost() -> None:
    assert usual_value_format(DEFAULT_VALUE_FORMAT, error_feedback=True) == "int2"
    assert usual_value_format(DEFAULT_VALUE_FORMAT, error_feedback=False) is None
    assert usual_value_format(DEFAULT_VALUE_FORMAT, error_feedback=True, q=0.0) is None
    assert usual_value_format("int2", error_feedback=False, q=0.0) == "int2"

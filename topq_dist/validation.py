"""Checks of numbers that users give, whose errors name what was given."""

from __future__ import annotations

import math
import sys
import warnings
from numbers import Real
from typing import Any

_PACKAGE = f"{__name__.partition('.')[0]}."


def check_fraction(name: str, value: Any) -> float:
    """Return `value` as a float, or raise naming `name` unless it is a number in [0, 1].

    Raises TypeError for what is no real number, ValueError for NaN or a number out of range.
    """
    number = check_number(name, value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name}={value!r}: expected a number in [0, 1]")
    return number


def check_number(name: str, value: Any) -> float:
    """Return `value` as a float, or raise naming `name` unless it is a finite real number."""
    # bool is a Real; q=True is a slip of the pen, not a fraction
    if isinstance(value, bool) or not isinstance(value, float | Real):
        raise TypeError(f"{name}={value!r}: expected a number, got {type(value).__name__}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name}={value!r}: expected a finite number")
    return number


def check_positive(name: str, value: float | None) -> float | None:
    """Return `value`, or raise naming `name` unless it is None or a finite number above zero."""
    if value is not None and check_number(name, value) <= 0.0:
        raise ValueError(f"{name}={value!r}: expected a number above zero, or None")
    return value


def warn_caller(message: str) -> None:
    """Warn at the line that has called into this package, however deep within it this is."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)

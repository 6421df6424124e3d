"""What the value of an option may be: each function reads one, or says what it expected."""

from __future__ import annotations

import argparse
import math


def fraction(text: str) -> float:
    """Read a number in [0, 1]."""
    number = _number(text)
    if not 0.0 <= number <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number in [0, 1]")
    return number


def positive(text: str) -> float:
    """Read a finite number above 0."""
    number = _number(text)
    if not 0.0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
    return number


def count(text: str) -> int:
    """Read an integer of at least 1."""
    return _integer(text, at_least=1)


def natural(text: str) -> int:
    """Read an integer of at least 0."""
    return _integer(text, at_least=0)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _integer(text: str, *, at_least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = at_least - 1
    # torch's generators and numpy's sizes take no more than 63 bits
    if not at_least <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of at least {at_least}")
    return number

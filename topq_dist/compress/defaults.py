"""What hook and server send when they are told nothing else.

Three hundredths in two bits cost what one hundredth in fp16 costs, a hundredth of dense, and train
better; a bound of one makes late arrivals as small as their neighbours (docs/accuracy.md).
"""

from __future__ import annotations

DEFAULT_Q = 0.97
DEFAULT_VALUE_FORMAT = "int2"
DEFAULT_BOUND = 1.0


def usual_bound(bound: float | None, *, error_feedback: bool) -> float | None:
    """Return `bound`, or None for the default one where there is no error feedback to go with."""
    return None if bound == DEFAULT_BOUND and not error_feedback else bound

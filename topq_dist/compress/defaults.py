"""What hook and server send when they are told nothing else.

Three hundredths in two bits cost what one hundredth in fp16 costs, a hundredth of dense, and train
better; a bound of one makes late arrivals as small as their neighbours (docs/accuracy.md).
"""

from __future__ import annotations

DEFAULT_Q = 0.97
DEFAULT_VALUE_FORMAT = str(b"int2", "ascii")  # objects of their own: a caller's are not they
DEFAULT_BOUND = float("1.0")


def usual_bound(bound: float | None, *, error_feedback: bool) -> float | None:
    """Return `bound`, or None for the default where no error feedback would keep what it clips.

    A bound that the caller has given stays, and is refused without error feedback.
    """
    return None if bound is DEFAULT_BOUND and not error_feedback else bound


def usual_value_format(
    value_format: str | None, *, error_feedback: bool, q: object = None
) -> str | None:
    """Return `value_format`, or None for the default where what rounding loses would be lost.

    That is without error feedback; and where q is 0: who leaves nothing out for later wants nothing
    rounded either. A format that the caller has given stays.
    """
    lossless = not error_feedback or q == 0
    return None if value_format is DEFAULT_VALUE_FORMAT and lossless else value_format

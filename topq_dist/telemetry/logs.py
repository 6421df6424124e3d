"""Log lines as text with a time, or each as one JSON object."""

from __future__ import annotations

import datetime as dt
import json
import logging
import math
from typing import Any, Literal, get_args

LogFormat = Literal["text", "json"]
# what a record has by itself; the rest was given as extra=
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class TextFormatter(logging.Formatter):
    """Lines such as "2026-11-01T12:00:00.123Z topq serve: INFO: listening on ...".

    program: who speaks. A message of several lines stays one.
    """

    def __init__(self, program: str) -> None:
        super().__init__(f"%(asctime)s {program}: %(levelname)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """Return the record's time, in UTC and ISO 8601."""
        return time_text(record.created)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and what was given as extra=.

    error: type and text of an exception beside it, traceback: where it was raised.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        line: dict[str, Any] = {
            "time": time_text(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _OWN}
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            line["error"] = f"{type(error).__name__}: {error}"
            line["traceback"] = self.formatException(record.exc_info)
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in line.items()
        }
        return json.dumps(finite, default=str)


def time_text(seconds: float) -> str:
    """Return a time since 1970 in UTC, as "2026-11-01T12:00:00.123Z"."""
    at = dt.datetime.fromtimestamp(seconds, dt.UTC)
    return at.strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03}Z"


def formatter(name: LogFormat, program: str) -> logging.Formatter:
    """Return the formatter of this name; raises ValueError."""
    if name not in get_args(LogFormat):
        raise ValueError(f"log_format={name!r}: expected one of {', '.join(get_args(LogFormat))}")
    return TextFormatter(program) if name == "text" else JsonFormatter()

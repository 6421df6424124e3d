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
# what begins a line for a reader, or steers a terminal
_CONTROL = {
    code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)
}


class TextFormatter(logging.Formatter):
    """Lines such as "2026-11-01T12:00:00.123Z topq serve: INFO: listening on ...".

    program: who speaks. A message of several lines stays one: its control characters are spelled
    out, as \\x0a is. The traceback of an exception follows as it is.
    """

    def __init__(self, program: str) -> None:
        super().__init__(f"%(asctime)s {program}: %(levelname)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """Return the record's time, in UTC and ISO 8601."""
        return time_text(record.created)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the line without a traceback."""
        return one_line(super().formatMessage(record))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and what was given as extra=.

    error: type and text of an exception beside it, traceback: where it was raised; stack: where
    the line was logged, if stack_info= asks for it. These names are the record's, whatever extra=
    has under them. A number that is not finite is null, and what JSON cannot hold is text.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        line: dict[str, Any] = {
            "time": time_text(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            line["error"] = f"{type(error).__name__}: {error}"
            line["traceback"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        taken = _OWN | line.keys()
        line |= {key: value for key, value in vars(record).items() if key not in taken}
        return json.dumps({key: _for_json(value) for key, value in line.items()})


def _for_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    try:
        return json.loads(json.dumps(value, allow_nan=False, default=str))
    except (ValueError, TypeError, RecursionError):
        return str(value)


def one_line(text: str) -> str:
    """Return the text with its control characters spelled out."""
    return text.translate(_CONTROL)


def time_text(seconds: float) -> str:
    """Return a time since 1970 in UTC, as "2026-11-01T12:00:00.123Z"."""
    at = dt.datetime.fromtimestamp(seconds, dt.UTC)
    return at.strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03}Z"


def formatter(name: LogFormat, program: str) -> logging.Formatter:
    """Return the formatter of this name; raises ValueError."""
    if name not in get_args(LogFormat):
        raise ValueError(f"log_format={name!r}: expected one of {', '.join(get_args(LogFormat))}")
    return TextFormatter(program) if name == "text" else JsonFormatter()

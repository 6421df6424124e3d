"""Log lines as text and as JSON."""

from __future__ import annotations

import json
import logging
import re
import sys

import pytest

from topq_dist.telemetry.logs import JsonFormatter, formatter, time_text


def record(message: str, *arguments: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("topq_dist.ps", logging.WARNING, "f.py", 1, message, arguments, None)
    made.created = 1_790_000_000.25
    vars(made).update(extra)
    return made


def test_text_has_a_time_who_speaks_and_how_loud() -> None:
    line = formatter("text", "topq serve").format(record("version %d", 7, version=7))
    assert line == "2026-09-21T14:13:20.250Z topq serve: WARNING: version 7"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time_text(0.0))


def test_json_is_a_line_with_what_was_given_beside_the_message() -> None:
    line = JsonFormatter().format(
        record("two\nlines of %s", "é", version=7, missing=["a"], rate=float("nan"))
    )
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "2026-09-21T14:13:20.250Z",
        "level": "warning",
        "logger": "topq_dist.ps",
        "message": "two\nlines of é",
        "version": 7,
        "missing": ["a"],
        "rate": None,
    }


def test_json_holds_an_exception_and_whatever_cannot_be_json_as_text() -> None:
    try:
        raise ValueError("out of place")
    except ValueError:
        made = record("failed", path=object())
        made.exc_info = sys.exc_info()
    line = json.loads(JsonFormatter().format(made))
    assert line["error"] == "ValueError: out of place"
    assert "Traceback" in line["traceback"]
    assert line["path"].startswith("<object")


def test_a_stack_that_was_asked_for_is_there() -> None:
    made = record("slow", stack_info="Stack (most recent call last):\n  here", stack="mine")
    line = json.loads(JsonFormatter().format(made))
    assert line["stack"] == "Stack (most recent call last):\n  here"
    assert formatter("text", "topq serve").format(made).endswith("\n  here")
    assert json.loads(JsonFormatter().format(record("slow", stack="mine")))["stack"] == "mine"


def test_text_of_several_lines_stays_one() -> None:
    made = record("a\nb\r\x1b[31m\x85\u2028%s", "x\n2026-09-21T14:13:20.250Z topq: INFO: forged")
    line = formatter("text", "topq serve").format(made)
    assert len(line.splitlines()) == 1
    assert line.endswith(
        r" a\x0ab\x0d\x1b[31m\x85\u2028x\x0a2026-09-21T14:13:20.250Z topq: INFO: forged"
    )
    try:
        raise ValueError("out of\nplace")
    except ValueError:
        made.exc_info = sys.exc_info()
    first, second, *_ = formatter("text", "topq serve").format(made).splitlines()
    assert (first, second) == (line, "Traceback (most recent call last):")


def test_json_is_json_and_its_own_fields_are_its_own_whatever_is_given() -> None:
    around: list[object] = []
    around.append(around)
    given = {
        "time": "mine",
        "level": 3,
        "error": "none",
        "nested": [float("nan"), {"x": float("inf")}],
        "around": around,
        "keyed": {(1, 2): 3},
        "odd": {"a": {1, 2}},
    }
    made = record("said", **given)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads(JsonFormatter().format(made), parse_constant=refuse)
    assert (line["time"], line["level"]) == ("2026-09-21T14:13:20.250Z", "warning")
    assert line["error"] == "none"
    assert line["nested"] == "[nan, {'x': inf}]"
    assert line["around"] == "[[...]]"
    assert line["keyed"] == "{(1, 2): 3}"
    assert line["odd"] == {"a": "{1, 2}"}
    try:
        raise ValueError("out of place")
    except ValueError:
        made.exc_info = sys.exc_info()
    assert json.loads(JsonFormatter().format(made))["error"] == "ValueError: out of place"


def test_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="log_format='xml': expected one of text, json"):
        formatter("xml", "topq serve")  # type: ignore[arg-type]

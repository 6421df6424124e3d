"""Parsers of the texts of `topq serve`'s options."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from topq_dist.ps.protocol.config import GroupRule

_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_NAMED = re.compile(rf"\s*({_NAME})\s*=\s*(.+?)\s*", re.DOTALL)
_GROUP = re.compile(rf"(?P<pattern>.+?):(?P<options>\s*{_NAME}\s*=.*)", re.DOTALL)
# a backslash within quotes goes with the letter after it, which may be a quote
_QUOTED_OR_LETTER = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|.""", re.DOTALL)
_WORDS = {"true": True, "false": False, "none": None}
_SIZE = re.compile(r"([0-9]+)\s*([KMGT]i?)?B?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_value(text: str) -> Any:
    """Return the number, tuple, truth value or quoted text that `text` spells; raises ValueError.

    As Python spells them, and true, false and none in any case.
    """
    if text.strip().lower() in _WORDS:
        return _WORDS[text.strip().lower()]
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(
            f"{text!r}: expected a value such as 0.9, (0.9, 0.999), true or 'text'"
        ) from error


def parse_named(text: str) -> tuple[str, Any]:
    """Return name and value of "name=value"; raises ValueError."""
    match = _NAMED.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r}: expected NAME=VALUE, such as weight_decay=0.1")
    return match[1], parse_value(match[2])


def parse_group(text: str) -> GroupRule:
    """Return the rule that "PATTERN:name=value,name=value" states; raises ValueError."""
    match = _GROUP.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r}: expected PATTERN:NAME=VALUE,..., such as '*.bias:lr=0.1'")
    options: dict[str, Any] = {}
    for part in _split_outside_brackets(match["options"]):
        name, value = parse_named(part)
        if name in options:
            raise ValueError(f"{text!r}: {name} is given twice")
        options[name] = value
    return GroupRule(pattern=match["pattern"].strip(), options=options)


def parse_size(text: str) -> int:
    """Return the bytes of "1048576", "64MB" or "64MiB" (powers of 1000 and 1024); ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r}: expected a number of bytes, such as 1048576, 64MB or 64MiB")
    unit = (match[2] or "").lower()
    base = 1024 if unit.endswith("i") else 1000
    return int(match[1]) * int(base ** _POWERS[unit.removesuffix("i")])


if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:  # no generic before click 8.3
    _ParamType = click.ParamType


class FilePath(click.Path):
    """A path; an empty text, as of a variable that is not set, is none."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path of a text; fails as click's types do."""
        if value == "":
            self.fail(f"{value!r}: expected a path", param, ctx)
        return super().convert(value, param, ctx)


class Seconds(click.FloatRange):
    """A number of seconds above zero."""

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number of a text; fails as click's types do."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r}: expected a number of seconds", param, ctx)
        return number


class Parsed(_ParamType):
    """A parameter read by one of the functions above; several in a variable are parted by ';'."""

    envvar_list_splitter = ";"

    def __init__(self, name: str, parse: Any) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value of a text; fails as click's types do."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _split_outside_brackets(text: str) -> list[str]:
    parts, depth = [""], 0
    for piece in _QUOTED_OR_LETTER.findall(text):
        if piece == "," and depth == 0:
            parts.append("")
            continue
        if piece in "([{":
            depth += 1
        elif piece in ")]}":
            depth -= 1
        parts[-1] += piece
    return parts

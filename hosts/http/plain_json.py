"""Limits for the JSON of requests: number of values, depth, numbers and texts. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from backends.errors import RequestError

MAX_VALUES = 200_000
"""In one body. A value of two bytes in the body can take a hundred bytes of memory."""
MAX_DEPTH = 16
"""Nested lists and objects, without the body itself. Code that reads or sends a value may
recurse at each level.
"""
MAX_NAME = 1024
"""Characters of an object key. Some keys are paths."""
MAX_NUMBER = 2**64
MARKS = (b",", b"[", b"{")
"""One of these precedes every value but the first."""


def require_few_values(body: bytes) -> None:
    """Raise RequestError for a body that may hold too many values, before it is parsed.

    Marks inside texts count, too.
    """
    if sum(body.count(mark) for mark in MARKS) > MAX_VALUES:
        raise RequestError(
            f"the body holds more than {MAX_VALUES} values. Send large data as base64 text, and "
            "prompts with fewer commas."
        )


def require_plain(body: Mapping[str, Any]) -> None:
    """Raise RequestError for the first value that is nested too deeply or cannot be used.

    The message names its field.
    """
    for name, value in body.items():
        _require_name(name)
        _require_plain(value, name, depth=0)


def _require_plain(value: Any, field: str, *, depth: int) -> None:
    if isinstance(value, dict | list):
        if depth == MAX_DEPTH:
            raise RequestError(
                f"{field} is nested deeper than {MAX_DEPTH} lists and objects. Send a flatter "
                "value.",
                field=field,
            )
        for name in value if isinstance(value, dict) else ():
            _require_name(name)
        for part in value.values() if isinstance(value, dict) else value:
            _require_plain(part, field, depth=depth + 1)
    elif isinstance(value, str):
        _require_text(value, field)
    elif isinstance(value, int | float) and not abs(value) <= MAX_NUMBER:
        raise RequestError(
            f"{field} holds a number beyond 2^64, or none at all. Send a finite number.",
            field=field,
        )


def _require_name(name: str) -> None:
    if len(name) > MAX_NAME or any(ord(character) < 32 for character in name):
        raise RequestError(
            f"{name[:40]!r} is not allowed as a name. Allowed: up to {MAX_NAME} characters, none "
            "of them a control character."
        )
    _require_text(name, "a name")


def _require_text(text: str, field: str) -> None:
    """Refuse lone surrogates, which neither tokenizers nor files accept."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{field} holds {text[error.start]!r}, half of a surrogate pair. Send text as UTF-8.",
            field=field,
        ) from error

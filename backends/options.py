"""Launch options as data, and parsers of single values. Imports no torch.

A parser turns text into a value, or raises ValueError with the allowed values as its message. Each
backend declares its options in its plan.py; hosts/launch/settings.py adds them to the host's.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Parser = Callable[[str], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One launch option of a backend."""

    name: str  # as on the command line, with underscores
    text: str  # for --help and docs
    parse: Parser
    default: Any = None  # None: the backend chooses
    aliases: tuple[str, ...] = ()  # further spellings
    metavar: str = ""


def switch(name: str, text: str) -> Option:
    """Declare a boolean option that is off by default."""
    return Option(name=name, text=text, parse=parse_switch, default=False)


def parse_switch(text: str) -> bool:
    """Parse 'true', 'on', 'no', '0' and the like; the empty text is true."""
    if text.strip().lower() in ("", "1", "true", "yes", "on"):
        return True
    if text.strip().lower() in ("0", "false", "no", "off", "none"):
        return False
    raise ValueError("true or false")


def whole(low: int, high: int = 2**31 - 1, *, multiple: int = 1) -> Callable[[str], int]:
    """Return a parser for whole numbers from `low` to `high`."""
    allowed = (
        f"a whole number from {low}"
        + (f" to {high}" if high < 2**31 - 1 else "")
        + (f", a multiple of {multiple}" if multiple > 1 else "")
    )

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError as error:
            raise ValueError(allowed) from error
        if not low <= value <= high or value % multiple:
            raise ValueError(allowed)
        return value

    return parse


def number(low: float, high: float) -> Callable[[str], float]:
    """Return a parser for numbers from `low` to `high`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError as error:
            raise ValueError(f"a number from {low:g} to {high:g}") from error
        if not low <= value <= high:
            raise ValueError(f"a number from {low:g} to {high:g}")
        return value

    return parse


def one_of(*names: str) -> Callable[[str], str]:
    """Return a parser for one of these names."""

    def parse(text: str) -> str:
        if text not in names:
            close = difflib.get_close_matches(text, names, n=1)
            raise ValueError(
                "one of " + ", ".join(names) + (f" (did you mean {close[0]}?)" if close else "")
            )
        return text

    return parse


def weights(text: str) -> tuple[float, ...]:
    """Parse '1,1,0.6' or '[1, 1, 0.6]' into (1.0, 1.0, 0.6)."""
    try:
        values = tuple(float(part) for part in text.strip("[] ").split(","))
    except ValueError as error:
        raise ValueError("positive numbers with commas between them, such as 1,1,0.6") from error
    if not values or min(values) <= 0:
        raise ValueError("positive numbers with commas between them, such as 1,1,0.6")
    return values


def counts(text: str) -> tuple[int, ...]:
    """Parse '10,9', '10 9' or '[10, 9]' into (10, 9)."""
    try:
        values = tuple(int(part) for part in text.strip("[] ").replace(",", " ").split())
    except ValueError as error:
        raise ValueError("whole numbers from 1 with commas between them, such as 10,9") from error
    if not values or min(values) < 1:
        raise ValueError("whole numbers from 1 with commas between them, such as 10,9")
    return values

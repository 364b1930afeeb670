"""Parsers of single launch values: text -> value. A ValueError says what is allowed. Imports no
torch.
"""

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIN_KEY = 16


def parse_switch(text: str) -> bool:
    if text.strip().lower() in ("", "1", "true", "yes", "on"):
        return True
    if text.strip().lower() in ("0", "false", "no", "off", "none"):
        return False
    raise ValueError("true or false")


def secret(text: str) -> str:
    """Return the key, or read it from @FILE: process listings do not show a file."""
    allowed = f"a key of at least {MIN_KEY} characters, or @FILE with one in its first line"
    if text.startswith("@"):
        try:
            lines = Path(text[1:]).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{allowed} (the file cannot be read)") from error
        text = lines[0].strip() if lines else ""
    if len(text) < MIN_KEY or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(f"{allowed}, printable ASCII without spaces")
    return text


def whole(low: int, high: int = 2**31 - 1, *, multiple: int = 1) -> Callable[[str], int]:
    """Return a parser for whole numbers in a range."""
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
    def parse(text: str) -> str:
        if text not in names:
            close = difflib.get_close_matches(text, names, n=1)
            raise ValueError(
                "one of " + ", ".join(names) + (f" (did you mean {close[0]}?)" if close else "")
            )
        return text

    return parse


def endpoint(text: str) -> str:
    """'10.0.0.1:29500' or '[fd00::1]:29500', as it is."""
    split_endpoint(text)
    return text


def split_endpoint(text: str) -> tuple[str, int]:
    """Host and port of an `endpoint`."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError("HOST:PORT, the address of the first machine and a free port there")
    return host, int(port)


def weights(text: str) -> tuple[float, ...]:
    """'1,1,0.6' or '[1, 1, 0.6]' -> (1.0, 1.0, 0.6)."""
    try:
        values = tuple(float(part) for part in text.strip("[] ").split(","))
    except ValueError as error:
        raise ValueError("positive numbers with commas between them, such as 1,1,0.6") from error
    if not values or min(values) <= 0:
        raise ValueError("positive numbers with commas between them, such as 1,1,0.6")
    return values


def counts(text: str) -> tuple[int, ...]:
    """'10,9', '10 9' or '[10, 9]' -> (10, 9)."""
    try:
        values = tuple(int(part) for part in text.strip("[] ").replace(",", " ").split())
    except ValueError as error:
        raise ValueError("whole numbers from 1 with commas between them, such as 10,9") from error
    if not values or min(values) < 1:
        raise ValueError("whole numbers from 1 with commas between them, such as 10,9")
    return values


def scales(text: str) -> dict[str, float]:
    """JSON {"path": scale}, a JSON string, or a bare path (scale 1)."""
    value = _json_or_text(text)
    if isinstance(value, str):
        return {value: 1.0}
    if not isinstance(value, dict) or not all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in value.values()
    ):
        raise ValueError('JSON such as {"path/to/file.safetensors": 0.8}')
    return {str(path): float(scale) for path, scale in value.items()}


def scheduler(text: str) -> dict[str, Any]:
    """JSON {"scheduler": name, ...}, or a bare name."""
    value = _json_or_text(text)
    if isinstance(value, str):
        return {"scheduler": value}
    if not isinstance(value, dict):
        raise ValueError(
            'a name such as euler, or JSON such as {"scheduler": "euler", "timestep_spacing": '
            '"trailing"}'
        )
    return value


def json_object(text: str) -> dict[str, Any]:
    value = _json_or_text(text)
    if not isinstance(value, dict):
        raise ValueError('JSON such as {"triton.cudagraphs": true}')
    return value


def _json_or_text(text: str) -> Any:
    """JSON where the text looks like JSON (starts with a brace, bracket or quote), else the text
    itself.
    """
    if text.lstrip()[:1] not in ("{", "[", '"'):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"valid JSON ({error.msg} at character {error.pos})") from error

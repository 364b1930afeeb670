"""Parsers of the host's own launch values: text -> value. A ValueError says what is allowed.
backends/options.py has those that the backends' options need too.
"""

import ipaddress
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MIN_KEY = 16
HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?", re.ASCII)


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


def public_url(text: str) -> str:
    """'https://draw.example/gpu/' without the final slash."""
    allowed = "a URL without query, such as https://draw.example or https://draw.example/gpu"
    try:
        parts = urlsplit(text)
        has_name = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError as error:
        raise ValueError(allowed) from error
    is_plain = not (parts.query or parts.fragment or "@" in parts.netloc)
    if parts.scheme not in ("http", "https") or not has_name or not is_plain:
        raise ValueError(allowed)
    if not re.fullmatch(r"(/[\w.~-]+)*/?", parts.path, re.ASCII):
        raise ValueError(f"{allowed}; its path has letters, digits and -._~ only")
    return text.rstrip("/")


def host_names(text: str) -> tuple[str, ...]:
    """'draw.example,10.0.0.7': names or addresses, without ports."""
    names = tuple(name.lower().removesuffix(".") for name in _items(text))
    for name in names:
        if not HOST_NAME.fullmatch(name) and not _is_address(name):
            raise ValueError(f"names or addresses such as draw.example, without port, not {name!r}")
    return names


def networks(text: str) -> tuple[str, ...]:
    """'127.0.0.1,10.0.0.0/8': addresses or networks."""
    for item in _items(text):
        try:
            ipaddress.ip_network(item)
        except ValueError as error:
            raise ValueError(
                f"addresses or networks such as 127.0.0.1,10.0.0.0/8 ({error})"
            ) from error
    return _items(text)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _items(text: str) -> tuple[str, ...]:
    """The items of a comma-separated text or of a JSON list. ValueError if there are none."""
    value = _json_or_text(text)
    items = value if isinstance(value, list) else str(value).split(",")
    found = tuple(str(item).strip() for item in items if str(item).strip())
    if not found:
        raise ValueError("at least one, separated by commas")
    return found


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

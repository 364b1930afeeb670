"""Emphasis in prompts by the rules of the A1111 web interface: text -> weighted parts. No torch.

(word) weighs 1.1, [word] 1 / 1.1, (word:1.3) 1.3; they nest. BREAK begins a new chunk of 75 tokens.
A backslash makes a bracket part of the text. backends/generation/text/prompts.py encodes the parts.
"""

import re
from dataclasses import dataclass

from backends.errors import RequestError, UnsupportedError

STEP = 1.1
"""Factor of one pair of brackets."""
MAX_WEIGHT = 100.0
BREAK = "BREAK"
_TOKEN = re.compile(
    r"\\(?P<escaped>[()\[\]\\])"
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|(?P<bracket>[()\[\]])"
    rf"|\s*\b(?P<stop>{BREAK})\b\s*"
    r"|(?P<text>[^\\()\[\]:B\s]+|.)",
    re.DOTALL,
)
_SYNTAX = re.compile(rf"[()\[\]\\]|\b{BREAK}\b")
_COMPOSITION = re.compile(r"\bAND\b")
_EDITING = re.compile(r"(?<!\\)\[[^\[\]]*(?:\||:\s*[\d.]+\s*\])[^\[\]]*")


@dataclass(slots=True)
class Part:
    """A piece of a prompt with one weight. `is_break` stands for BREAK and has no text."""

    text: str
    weight: float = 1.0
    is_break: bool = False


def has_emphasis(text: str) -> bool:
    """Whether A1111 would read something of the text as syntax."""
    return _SYNTAX.search(text) is not None or has_composition(text)


def has_composition(text: str) -> bool:
    """Whether the text has AND, or brackets that change it between steps."""
    return (_COMPOSITION.search(text) or _EDITING.search(text)) is not None


def parse_emphasis(text: str, *, field: str) -> list[Part]:
    """Return the parts, of which neighbours differ in weight.

    field: for messages. UnsupportedError for prompts that change between steps, RequestError for a
    weight beyond MAX_WEIGHT.
    """
    _require_one_prompt(text, field)
    parts: list[Part] = []
    open_brackets: list[tuple[str, int]] = []
    for token in _TOKEN.finditer(text):
        kind, bracket = token.lastgroup, token["bracket"]
        if bracket in ("(", "["):
            open_brackets.append((bracket, len(parts)))
        elif kind == "weight" and _is_open(open_brackets, "("):
            _close(parts, open_brackets, "(", float(token["weight"]))
        elif bracket == ")" and _is_open(open_brackets, "("):
            _close(parts, open_brackets, "(", STEP)
        elif bracket == "]" and _is_open(open_brackets, "["):
            _close(parts, open_brackets, "[", 1 / STEP)
        elif kind == "stop":
            parts.append(Part("", is_break=True))
        elif token[0] != "\\":  # one that escapes nothing vanishes
            parts.append(Part(token["escaped"] or token[0]))
    for bracket, start in open_brackets:  # never closed: they reach to the end
        _multiply(parts, start, STEP if bracket == "(" else 1 / STEP)
    if beyond := [part.weight for part in parts if abs(part.weight) > MAX_WEIGHT]:
        raise RequestError(
            f"{field} has the weight {beyond[0]:g}. Allowed: up to {MAX_WEIGHT:g}.", field=field
        )
    return _merged(parts)


def _require_one_prompt(text: str, field: str) -> None:
    if found := _COMPOSITION.search(text) or _EDITING.search(text):
        raise UnsupportedError(
            f"{field} has {found[0][:80]!r}: prompts that are combined (AND) or change between the "
            "steps ([a:b:0.5], [a|b]) are not available. Write one prompt; a backslash before a "
            "bracket makes it plain text.",
            field=field,
        )


def _is_open(open_brackets: list[tuple[str, int]], bracket: str) -> bool:
    return any(each == bracket for each, _ in open_brackets)


def _close(
    parts: list[Part], open_brackets: list[tuple[str, int]], bracket: str, factor: float
) -> None:
    """Multiply everything since the last such bracket, which need not be the innermost one."""
    index = max(place for place, (each, _) in enumerate(open_brackets) if each == bracket)
    _multiply(parts, open_brackets.pop(index)[1], factor)


def _multiply(parts: list[Part], start: int, factor: float) -> None:
    for part in parts[start:]:
        part.weight *= factor


def _merged(parts: list[Part]) -> list[Part]:
    merged: list[Part] = []
    for part in parts:
        last = merged[-1] if merged else None
        if last and not (last.is_break or part.is_break) and last.weight == part.weight:
            last.text += part.text
        else:
            merged.append(part)
    return merged or [Part("")]

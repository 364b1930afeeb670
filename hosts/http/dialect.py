"""A dialect: the paths, error shape and field rules of one API. Its routes are a Blueprint.

Each field of the API's protocol has a rule: it is done, some of its values have no effect, or it is
refused with a reason. A field without a rule is an error, so nothing is ignored silently.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from flask import Blueprint

from backends.errors import RequestError, UnsupportedError
from backends.request import whole_number

JSON = ("application/json",)
ErrorBody = Callable[[str, int, str | None], dict[str, Any]]
T = TypeVar("T")
_ON = ("true", "1", "1.0", "on", "yes")
_OFF = ("false", "0", "0.0", "off", "no")
OFF = (False, "false", "off", "no", "0", "none")
"""Values by which clients turn something off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Treatment of a field. null and empty texts, lists and objects always pass."""

    accepted: tuple[Any, ...] | None = None
    """Accepted values; None means all."""
    reason: str = ""
    """Why other values are refused, or why no value can change an image."""

    @property
    def kind(self) -> str:
        if self.accepted is None:
            return "neutral" if self.reason else "done"
        return "neutral" if self.accepted else "refused"

    def allows(self, value: Any) -> bool:
        if self.accepted is None or is_empty(value):
            return True
        return any(_is_same(value, each) for each in self.accepted)


DONE = Rule()
"""The field is used. Its values are validated where it is read."""


def neutral(*values: Any, reason: str) -> Rule:
    """Accept values that have no effect; refuse others for this reason."""
    return Rule(accepted=values, reason=reason)


def harmless(reason: str) -> Rule:
    """Accept any value, since none can change an image, for this reason."""
    return Rule(reason=reason)


def refused(reason: str) -> Rule:
    """Refuse any value, for this reason."""
    return Rule(accepted=(), reason=reason)


def require_known(
    body: Mapping[str, Any], rules: Mapping[str, Rule], hints: Mapping[str, str] | None = None
) -> None:
    """Refuse the first field that has no rule or whose rule forbids its value.

    hints: unknown field -> its name here. "strict": false skips the check.
    """
    if not is_strict(body):
        return
    for name, value in body.items():
        if value is None or name == "strict":
            continue
        if name not in rules:
            raise RequestError(_unknown(name, rules, hints or {}), field=name)
        if not rules[name].allows(value):
            raise UnsupportedError(
                f"{name}={shown(value)} is not available: {rules[name].reason}. Leave it out.",
                field=name,
            )


def require_once(body: Mapping[str, Any], *names: str) -> None:
    """Refuse names of one thing with different values, since only one of them could be used.

    "strict": false skips the check.
    """
    given = [name for name in names if not is_empty(body.get(name))]
    others = [name for name in given[1:] if not _means_same(body[name], body[given[0]])]
    if others and is_strict(body):
        raise contradiction(body, given[0], others[0])


def contradiction(body: Mapping[str, Any], one: str, other: str) -> RequestError:
    """Return the error for two fields that cannot both be followed."""
    return RequestError(
        f"{one}={shown(body[one])} and {other}={shown(body[other])} contradict each other. "
        "Leave one of them out.",
        field=other,
    )


def is_strict(body: Mapping[str, Any]) -> bool:
    """Whether unknown fields are errors. RequestError if `strict` is not a boolean."""
    value = body.get("strict")
    if value is None or value is True or _is_same(value, "true"):
        return True
    if _is_same(value, False) or _is_same(value, "false"):
        return False
    raise RequestError(
        f"strict={shown(value)} is not allowed. Allowed: true, false.", field="strict"
    )


def whole(body: Mapping[str, Any], name: str, default: int, *, low: int, high: int) -> int:
    """Return the integer of a field. RequestError if it is out of bounds."""
    value = body.get(name)
    if is_empty(value):
        return default
    number = whole_number(value)
    if number is None or not low <= number <= high:
        raise RequestError(
            f"{name}={shown(value)} is not allowed. Allowed: {low} to {high}.", field=name
        )
    return number


def choice(body: Mapping[str, Any], name: str, allowed: Mapping[str, T], default: T) -> T:
    """Return the meaning of a field's word, in upper or lower case. RequestError if it is not
    allowed.
    """
    value = body.get(name)
    if is_empty(value):
        return default
    word = value.strip().lower() if isinstance(value, str) else None
    if word not in allowed:
        raise RequestError(
            f"{name}={shown(value)} is not allowed. Allowed: {', '.join(allowed)}.", field=name
        )
    return allowed[word]


def truth(body: Mapping[str, Any], name: str, default: bool) -> bool:
    """Return the boolean of a field, which clients also send as a number or text."""
    value = body.get(name)
    if is_empty(value):
        return default
    text = str(value).strip().lower()
    if text not in (*_ON, *_OFF):
        raise RequestError(
            f"{name}={shown(value)} is not allowed. Allowed: true, false.", field=name
        )
    return text in _ON


def is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and len(value) == 0)


def shown(value: Any) -> str:
    """Return the value as messages show it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _unknown(name: str, rules: Iterable[str], hints: Mapping[str, str]) -> str:
    close = difflib.get_close_matches(name[:80].lower(), list(rules), n=1, cutoff=0.0)
    nearest = hints.get(name) or close[0]
    given = name if name.isprintable() and len(name) <= 80 else shown(name)
    return (
        f"{given} is not a field of this API. The nearest one is {nearest}. Correct or leave out "
        f'{given}, or send "strict": false to have unknown fields ignored.'
    )


def _is_same(value: Any, other: Any) -> bool:
    """Whether a value equals an accepted one, which may be sent as text."""
    if isinstance(value, str):
        is_number = isinstance(other, int | float) and not isinstance(other, bool)
        if is_number and (number := whole_number(value)) is not None:
            return number == other
        return value.strip().lower() == str(other).lower()
    return not isinstance(other, str) and bool(value == other)


def _means_same(one: Any, other: Any) -> bool:
    """Whether two values are equal, either of them perhaps sent as text."""
    return _is_same(one, other) or _is_same(other, one)


def error_body(message: str, status: int, field: str | None = None) -> dict[str, Any]:
    """Return the error of our own API, with the four keys that both existing clients read."""
    return {"message": message, "output": None, "latent": None, "is_image": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One call of an API, for GET /openapi.json."""

    method: str
    """In lower case."""
    path: str
    """With parameters in braces."""
    summary: str
    """Short description."""
    rules: Mapping[str, Rule] | None = None
    """The fields of its body, where it has one."""
    media_type: str = "application/json"
    """Content type of the response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One API of the host."""

    blueprint: Blueprint
    """Its routes."""
    paths: tuple[str, ...] = ()
    """Path prefixes, also of unknown paths. The longest matching prefix decides."""
    error_body: ErrorBody = error_body
    """Builds the JSON of an error from its message, its status, and the field at fault if known."""
    media_types: tuple[str, ...] = JSON
    """Content types that its POSTs accept."""
    is_body_optional: bool = False
    """Whether some of its POSTs have no body."""
    keeps_jobs: bool = False
    """Whether its jobs are kept until they can run, even while a machine is absent."""
    needs_model: bool = True
    """Whether its POSTs are refused while no model is loaded."""
    operations: tuple[Operation, ...] = ()
    """Its calls, unless /openapi.json describes them in more detail."""


OURS = Dialect(blueprint=Blueprint("none", __name__))
"""Dialect of paths that belong to no other."""


def dialect_of(path: str, dialects: Iterable[Dialect]) -> Dialect:
    """Return the dialect with the longest prefix of this path."""
    starts = [(start, each) for each in dialects for start in each.paths if path.startswith(start)]
    return max(starts, key=lambda found: len(found[0]), default=("", OURS))[1]

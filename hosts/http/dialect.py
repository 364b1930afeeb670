"""A dialect: the paths of one API, its error shape and its rules. Its routes are a Blueprint.

The rules say of every field of the API's protocol that it is done, that some values of it ask for
nothing, or why it is refused. What no rule allows is an error, so nothing is ignored in silence.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flask import Blueprint

from backends.errors import RequestError, UnsupportedError

JSON = ("application/json",)
ErrorBody = Callable[[str, int], dict[str, Any]]
OFF = (False, "false", "off", "no", "0", "none")
"""How clients write that a switch is off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What becomes of a field. null, empty texts, lists and objects never ask for anything."""

    accepted: tuple[Any, ...] | None = None
    """Values that are accepted; None: all of them."""
    reason: str = ""
    """Why other values are refused, or why none of them can change an image."""

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
"""The field is read; its values are checked where that is done."""


def neutral(*values: Any, reason: str) -> Rule:
    """These values ask for nothing; others are refused for the reason."""
    return Rule(accepted=values, reason=reason)


def harmless(reason: str) -> Rule:
    """No value can change an image, for the reason."""
    return Rule(reason=reason)


def refused(reason: str) -> Rule:
    return Rule(accepted=(), reason=reason)


def require_known(
    body: Mapping[str, Any], rules: Mapping[str, Rule], hints: Mapping[str, str] | None = None
) -> None:
    """Refuse the first field without a rule, or with a value that its rule does not allow.

    hints: name of no field -> what it is called here. "strict": false lets everything pass.
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
                f"{name}={shown(value)} is not available: {rules[name].reason}. Leave it out."
            )


def is_strict(body: Mapping[str, Any]) -> bool:
    """Whether unknown fields are errors. RequestError if `strict` is no truth value."""
    value = body.get("strict")
    if value is None or value is True or _is_same(value, "true"):
        return True
    if _is_same(value, False) or _is_same(value, "false"):
        return False
    raise RequestError(
        f"strict={shown(value)} is not allowed. Allowed: true, false.", field="strict"
    )


def is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and len(value) == 0)


def shown(value: Any) -> str:
    """The value as messages show it."""
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
    """Whether a value says the same as one that is accepted, which may be sent as text."""
    if isinstance(value, str):
        return value.strip().lower() == str(other).lower()
    return not isinstance(other, str) and bool(value == other)


def error_body(message: str, status: int) -> dict[str, Any]:
    """Our own shape: the four keys that both existing clients look for, on every error."""
    return {"message": message, "output": None, "latent": None, "is_image": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One call of an API, for GET /openapi.json."""

    method: str
    """In small letters."""
    path: str
    """With its parameters in braces."""
    summary: str
    """What it does."""
    rules: Mapping[str, Rule] | None = None
    """The fields of its body, where it has one."""
    media_type: str = "application/json"
    """Of its answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One API that the host speaks."""

    blueprint: Blueprint
    """Its routes."""
    paths: tuple[str, ...] = ()
    """Beginnings of its paths, unknown ones included; of two dialects the longer beginning wins."""
    error_body: ErrorBody = error_body
    """The JSON of an error, from its message and its status."""
    media_types: tuple[str, ...] = JSON
    """Content types that its POSTs may have."""
    is_body_optional: bool = False
    """Whether some of its POSTs say everything in their path."""
    keeps_jobs: bool = False
    """Whether its jobs wait until they can be done, also for a machine that is away."""
    needs_model: bool = True
    """Whether its POSTs are refused while no model is loaded."""
    operations: tuple[Operation, ...] = ()
    """Its calls, where /openapi.json does not say more of them."""


OURS = Dialect(blueprint=Blueprint("none", __name__))
"""The rules of a path that no dialect has."""


def dialect_of(path: str, dialects: Iterable[Dialect]) -> Dialect:
    """The dialect whose paths begin as this one does."""
    starts = [(start, each) for each in dialects for start in each.paths if path.startswith(start)]
    return max(starts, key=lambda found: len(found[0]), default=("", OURS))[1]

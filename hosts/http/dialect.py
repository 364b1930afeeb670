"""A dialect: the paths of one API, its error shape and its rules. Its routes are a Blueprint."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from flask import Blueprint

JSON = ("application/json",)
ErrorBody = Callable[[str, int], dict[str, Any]]


def error_body(message: str, status: int) -> dict[str, Any]:
    """Our own shape: the four keys that both existing clients look for, on every error."""
    return {"message": message, "output": None, "latent": None, "is_image": False}


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


OURS = Dialect(blueprint=Blueprint("none", __name__))
"""The rules of a path that no dialect has."""


def dialect_of(path: str, dialects: Iterable[Dialect]) -> Dialect:
    """The dialect whose paths begin as this one does."""
    starts = [(start, each) for each in dialects for start in each.paths if path.startswith(start)]
    return max(starts, key=lambda found: len(found[0]), default=("", OURS))[1]

"""Who may ask at all: names under which this host is served, pages of other sites, keys. Refuses
before any route runs.
"""

import hmac
from urllib.parse import urlsplit

from flask import current_app, request
from werkzeug.exceptions import HTTPException

from backends.errors import RequestError, UnavailableError
from hosts.compat import v2_routes
from hosts.http import a1111, jobs_api, openai
from hosts.http.request_io import client
from hosts.launch.settings import Settings
from hosts.launch.start_plan import LOOPBACK_NAMES
from hosts.supervision.host_state import Phase

WILDCARDS = frozenset({"0.0.0.0", "::"})
WITHOUT_KEY = frozenset(
    {"/", "/page.css", "/page.js", "/docs", "/docs.js", "/healthz", "/livez", "/readyz"}
)
"""The pages must load before they can ask for the key; probes have none. Neither tells anything
about jobs.
"""

KEEPING = frozenset({jobs_api.blueprint.name})
"""Blueprints whose jobs are kept until they can be done."""


class ForeignOrigin(HTTPException):
    """A page of another site sends requests with the user's browser."""

    code = 403


class UnsupportedMediaType(HTTPException):
    """werkzeug's own text would not say what to send."""

    code = 415


class KeyMissing(HTTPException):
    """No key, or another one."""

    code = 401


def refuse_strangers() -> None:
    """Host, Origin, key, rate and content type of the request at hand."""
    refuse_unknown(current_app.extensions["host"].settings)
    if request.method == "POST":
        current_app.extensions["rate"].take(client())
    _require_content_type()
    if request.method == "POST" and request.blueprint not in KEEPING:
        _require_all_machines()
    if request.method == "POST" and request.blueprint != v2_routes.blueprint.name:
        host = current_app.extensions["host"]
        host.protocol.require_pipeline(host.state)


def refuse_unknown(settings: Settings) -> None:
    """Host, Origin and key: what can be refused before anything else of the request is read."""
    _require_name(LOOPBACK_NAMES | {settings.host})
    _require_own_origin()
    if settings.api_key is not None and request.path not in WITHOUT_KEY:
        _require_key(settings.api_key)


def _require_all_machines() -> None:
    """A machine may be away for long. Jobs that are kept can wait for it, clients that hold a
    connection should not.
    """
    state = current_app.extensions["host"].state
    if state.phase is Phase.WAITING:
        raise UnavailableError(
            f"the host is {state.reason}. Send the request again later, or send it to /v1/jobs, "
            "which keeps it."
        )


def _require_name(allowed: frozenset[str]) -> None:
    """A page of another site may resolve its own name to this address (DNS rebinding): only names
    of this host are served.
    """
    name = urlsplit(f"//{request.host}").hostname or ""
    if name not in allowed and not allowed & WILDCARDS:
        raise RequestError(
            f"Host {name!r} is not served here. Allowed: {', '.join(sorted(allowed))}.",
            field="Host",
        )


def _require_own_origin() -> None:
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != request.host:
        raise ForeignOrigin(
            f"Origin {origin!r} is not served here. Allowed: this host's own page, and clients "
            "that are no browsers."
        )


def _require_key(key: str) -> None:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
        raise KeyMissing("this host wants its key. Send it as 'Authorization: Bearer KEY'.")


def _require_content_type() -> None:
    kinds = (
        openai.FORM_TYPES if request.blueprint == openai.blueprint.name else ("application/json",)
    )
    if request.method == "POST" and request.mimetype not in kinds and not _has_no_body():
        raise UnsupportedMediaType(
            f"Content-Type {request.mimetype or '(none)'!r} is not allowed. Send "
            f"{' or '.join(kinds)}."
        )


def _has_no_body() -> bool:
    """Some POSTs of other dialects say everything in their path."""
    return request.content_length in (0, None) and request.blueprint in (
        a1111.blueprint.name,
        v2_routes.blueprint.name,
    )

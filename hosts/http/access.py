"""Access checks before any route runs: host names, other sites' pages, keys, rates, content
types.
"""

import hmac
from urllib.parse import urlsplit

from flask import current_app, request
from werkzeug.exceptions import HTTPException

from backends.errors import RequestError, UnavailableError
from hosts.http.dialect import Dialect
from hosts.http.request_io import client
from hosts.launch.settings import Settings
from hosts.launch.start_plan import LOOPBACK_NAMES
from hosts.supervision.host_state import Phase

WILDCARDS = frozenset({"0.0.0.0", "::"})
WITHOUT_KEY = frozenset(
    {"/", "/page.css", "/page.js", "/form.js", "/docs", "/docs.js", "/healthz", "/livez", "/readyz"}
)
"""Paths that need no key: the page loads before it asks for one, and probes have none. None of
them reveals anything about jobs.
"""


class ForeignOrigin(HTTPException):
    """A page of another site sent this request with the user's browser."""

    code = 403


class UnsupportedMediaType(HTTPException):
    """Like werkzeug's error, but the message says what to send."""

    code = 415


class KeyMissing(HTTPException):
    """The key is missing or wrong."""

    code = 401


def refuse_strangers() -> None:
    """Check Host, Origin, key, rate and content type of the current request."""
    refuse_unknown(current_app.extensions["host"].settings)
    if request.method == "POST":
        current_app.extensions["rate"].take(client())
    if request.method == "POST" and request.url_rule is not None:  # else 404 or 405 comes next
        dialect = _dialect()
        _require_content_type(dialect)
        _require_model(dialect)


def refuse_unknown(settings: Settings) -> None:
    """Check Host, Origin and key, before anything else of the request is read."""
    _require_name(LOOPBACK_NAMES | {settings.host})
    _require_own_origin()
    if settings.api_key is not None and request.path not in WITHOUT_KEY:
        _require_key(settings.api_key)


def _dialect() -> Dialect:
    """Return the dialect of the current route."""
    dialects: tuple[Dialect, ...] = current_app.extensions["dialects"]
    return next(each for each in dialects if each.blueprint.name == request.blueprint)


def _require_model(dialect: Dialect) -> None:
    """Refuse a request that would wait for an absent machine or for a model that nobody has chosen.

    Kept jobs may wait for a machine.
    """
    host = current_app.extensions["host"]
    if host.state.phase is Phase.WAITING and not dialect.keeps_jobs:
        raise UnavailableError(
            f"the host is {host.state.reason}. Send the request again later, or send it to "
            "/v1/jobs, which keeps it."
        )
    if dialect.needs_model:
        host.protocol.require_pipeline(host.state)


def _require_name(allowed: frozenset[str]) -> None:
    """Refuse Host names that are not this host's.

    A page of another site may resolve its own name to this address (DNS rebinding). A request
    without a Host header comes from no browser and passes.
    """
    if "Host" not in request.headers or allowed & WILDCARDS:
        return
    given = request.headers["Host"]
    if _name_of(given) not in allowed:
        raise RequestError(
            f"Host {given[:200]!r} is not served here. Allowed: {', '.join(sorted(allowed))}. A "
            "proxy must send one of them, or start the host with the name as --host.",
            field="Host",
        )


def _name_of(host: str) -> str:
    """Return the name without port and trailing dot; empty if it is not a valid name."""
    try:
        return (urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:  # brackets that hold no address
        return ""


def _require_own_origin() -> None:
    origin = request.headers.get("Origin")
    if origin is None:
        return
    try:
        is_own = urlsplit(origin).netloc == request.host
    except ValueError:  # brackets that hold no address
        is_own = False
    if not is_own:
        raise ForeignOrigin(
            f"Origin {origin[:200]!r} is not served here. Allowed: this host's own page, and "
            "clients that are no browsers."
        )


def _require_key(key: str) -> None:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
        raise KeyMissing("this host wants its key. Send it as 'Authorization: Bearer KEY'.")


def _require_content_type(dialect: Dialect) -> None:
    has_no_body = dialect.is_body_optional and request.content_length in (0, None)
    if request.mimetype not in dialect.media_types and not has_no_body:
        raise UnsupportedMediaType(
            f"Content-Type {request.mimetype or '(none)'!r} is not allowed. Send "
            f"{' or '.join(dialect.media_types)}."
        )

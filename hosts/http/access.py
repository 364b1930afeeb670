"""Who may ask at all: names under which this host is served, pages of other sites, keys. Refuses
before any route runs.
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
"""The pages must load before they can ask for the key; probes have none. Neither tells anything
about jobs.
"""


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
    if request.method == "POST" and request.url_rule is not None:  # else 404 or 405 comes next
        dialect = _dialect()
        _require_content_type(dialect)
        _require_model(dialect)


def refuse_unknown(settings: Settings) -> None:
    """Host, Origin and key: what can be refused before anything else of the request is read."""
    _require_name(LOOPBACK_NAMES | {settings.host})
    _require_own_origin()
    if settings.api_key is not None and request.path not in WITHOUT_KEY:
        _require_key(settings.api_key)


def _dialect() -> Dialect:
    """The dialect of the route."""
    dialects: tuple[Dialect, ...] = current_app.extensions["dialects"]
    return next(each for each in dialects if each.blueprint.name == request.blueprint)


def _require_model(dialect: Dialect) -> None:
    """Refuse what would wait for a machine, which may be away for long, or for a model that nobody
    has chosen. Jobs that are kept can wait for a machine.
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
    """A page of another site may resolve its own name to this address (DNS rebinding): only names
    of this host are served. A request without any name comes from no browser.
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
    """The name without its port, and without the dot that ends a full one; empty if it is none."""
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

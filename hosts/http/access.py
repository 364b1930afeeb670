"""Access checks before any route runs: host names, other sites' pages, keys, signed links, rates,
content types.
"""

import hashlib
import hmac
import re
import time
from collections.abc import Mapping
from urllib.parse import urlencode, urlsplit

from flask import Response, current_app, g, request
from werkzeug.exceptions import HTTPException

from backends.errors import RequestError, UnavailableError
from hosts.http.dialect import Dialect
from hosts.http.identity.keys import Key, Keys
from hosts.http.identity.sender import client
from hosts.http.page.routes import PARTS
from hosts.launch.settings import Settings
from hosts.launch.start_plan import LOOPBACK_NAMES
from hosts.supervision.host_state import Phase

WILDCARDS = frozenset({"0.0.0.0", "::"})
WITHOUT_KEY = frozenset(
    {
        "/",
        *(f"/{name}" for name in PARTS),
        "/docs",
        "/docs.js",
        "/healthz",
        "/livez",
        "/readyz",
    }
)
"""Paths that need no key: the page loads before it asks for one, and probes have none. None of
them reveals anything about jobs.
"""

LINK_S = 24 * 3600
"""How long a signed link is valid, in seconds."""


class ForeignOrigin(HTTPException):
    """A page of another site sent this request with the user's browser."""

    code = 403


class OperatorOnly(HTTPException):
    """This request is the operator's, who has another key."""

    code = 403


class UnsupportedMediaType(HTTPException):
    """Like werkzeug's error, but the message says what to send."""

    code = 415


class KeyMissing(HTTPException):
    """The key is missing or wrong."""

    code = 401

    @property
    def offers(self) -> list[str]:
        """The schemes for WWW-Authenticate: Basic for programs and for a typed address, but not for
        scripts of a page, in which browsers would open a dialog of their own.
        """
        is_script = request.headers.get("Sec-Fetch-Mode", "navigate") != "navigate"
        basic = 'Basic realm="diffusion-launcher", charset="UTF-8"'
        return ["Bearer"] if is_script else ["Bearer", basic]


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
    public = urlsplit(settings.public_url or "")
    own = {settings.host, *(settings.allowed_hosts or ()), *filter(None, [public.hostname])}
    _require_name(LOOPBACK_NAMES | own)
    if not _is_allowed(settings):
        _require_own_origin(public.netloc)
    elif request.method == "OPTIONS":  # browsers ask without the key whether they may send it
        return
    keys: Keys = current_app.extensions["keys"]
    if keys.are_required and request.path not in WITHOUT_KEY:
        g.key = _require_key(keys)


def let_browsers_read(response: Response) -> Response:
    """Let the pages of --allowed_origins read this response, and send what they ask to send."""
    if not _is_allowed(current_app.extensions["host"].settings):
        return response
    response.vary.add("Origin")
    response.headers["Access-Control-Allow-Origin"] = request.headers["Origin"]
    if request.method == "OPTIONS":
        response.headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE"
        asked = request.headers.get("Access-Control-Request-Headers", "Content-Type")
        response.headers["Access-Control-Allow-Headers"] = asked
        response.headers["Access-Control-Allow-Private-Network"] = "true"
        response.headers["Access-Control-Max-Age"] = "600"
    return response


def _is_allowed(settings: Settings) -> bool:
    """Whether a page of --allowed_origins sent the current request."""
    return request.headers.get("Origin", "").lower() in (settings.allowed_origins or ())


def require_operator() -> None:
    """Refuse a request that changes the host for all clients, unless it has the operator's key:
    --api_key, where other clients have those of --api_keys.
    """
    if current_app.extensions["host"].settings.api_keys is not None and g.key.name:
        raise OperatorOnly(
            f"{request.path} changes the host for all clients. Send it with the operator's key "
            "(--api_key), not with one of --api_keys."
        )


def link_to(path: str, **query: str) -> str:
    """Return the URL of a GET of this host as the client of the current request reaches it.

    On a host with a key it is signed, and needs no key until it expires.
    """
    settings = current_app.extensions["host"].settings
    if (key := g.get("key")) is not None:
        query["expires"] = str(int(time.time()) + LINK_S)
        if key.name:
            query["key"] = key.name
        query["signature"] = _signature(key, path, query)
    base = settings.public_url or request.url_root.rstrip("/")
    return f"{base}{path}{'?' if query else ''}{urlencode(query)}"


def _signature(key: Key, path: str, query: Mapping[str, str]) -> str:
    """Return the signature of a GET of this path with this query."""
    items = sorted((name, value) for name, value in query.items() if name != "signature")
    return hmac.new(
        key.derived("links"), f"{path}?{urlencode(items)}".encode(), hashlib.sha256
    ).hexdigest()


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
            f"Host {given[:200]!r} is not served here. Allowed: {', '.join(sorted(allowed))}. Let "
            "the proxy send one of them, or start the host with the name in --public_url or "
            "--allowed_hosts; --host names an address to listen on.",
            field="Host",
        )


def _name_of(host: str) -> str:
    """Return the name without port and trailing dot; empty if it is not a valid name."""
    try:
        return (urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:  # brackets that hold no address
        return ""


def _require_own_origin(public: str) -> None:
    """Refuse other sites' pages. public: name and port of --public_url; may be empty."""
    origin = request.headers.get("Origin")
    if origin is None:
        return
    try:
        netloc = urlsplit(origin).netloc
    except ValueError:  # brackets that hold no address
        netloc = ""
    if not netloc or netloc not in (request.host, public):
        raise ForeignOrigin(
            f"Origin {origin[:200]!r} is not served here. Allowed: this host's own page, and "
            "clients that are no browsers. Behind a proxy, start the host with --public_url, the "
            "address that browsers show; for a program that runs in a browser, with "
            "--allowed_origins."
        )


def _require_key(keys: Keys) -> Key:
    """Return the key of the current request. KeyMissing if it has none."""
    if (key := keys.find(request.headers.get("Authorization", ""))) is not None:
        return key
    signature = request.args.get("signature")
    if signature is None:
        raise KeyMissing(
            "this host needs its key. Send it as 'Authorization: Bearer KEY', or as the password "
            "of Basic authentication with any user name."
        )
    key = keys.named(request.args.get("key", ""))
    if key is None or not _is_signed(key, signature):
        raise KeyMissing(
            f"this link has expired, or was changed. Links are valid for {LINK_S // 3600} hours; "
            "fetch the result with the key."
        )
    return key


def _is_signed(key: Key, signature: str) -> bool:
    """Whether this request is a GET of a link of `link_to` that has not expired."""
    query = request.args.to_dict()
    expires = query.get("expires", "")
    is_valid = re.fullmatch(r"\d{1,12}", expires, re.ASCII) and time.time() < int(expires)
    own = _signature(key, request.path, query)
    is_own = hmac.compare_digest(signature.encode("utf-8", "replace"), own.encode())
    return request.method in ("GET", "HEAD") and bool(is_valid) and is_own


def _require_content_type(dialect: Dialect) -> None:
    has_no_body = dialect.is_body_optional and request.content_length in (0, None)
    if request.mimetype not in dialect.media_types and not has_no_body:
        raise UnsupportedMediaType(
            f"Content-Type {request.mimetype or '(none)'!r} is not allowed. Send "
            f"{' or '.join(dialect.media_types)}."
        )

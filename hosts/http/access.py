"""Access checks before any route runs: proxies, host names, other sites' pages, keys, signed links,
rates, content types.
"""

import hashlib
import hmac
import ipaddress
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any
from urllib.parse import urlencode, urlsplit

from flask import current_app, request
from werkzeug.exceptions import HTTPException

from backends.errors import RequestError, UnavailableError
from hosts.http.dialect import Dialect
from hosts.http.request_io import client, key_in
from hosts.launch.settings import Settings
from hosts.launch.start_plan import LOOPBACK_NAMES
from hosts.supervision.host_state import Phase

WILDCARDS = frozenset({"0.0.0.0", "::"})
WITHOUT_KEY = frozenset(
    {
        "/",
        "/page.css",
        "/page.js",
        "/form.js",
        "/mask.js",
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
FORWARDED = ("FOR", "PROTO", "HOST", "PREFIX")
"""The X-Forwarded headers that are read."""

logger = logging.getLogger(__name__)


class ForeignOrigin(HTTPException):
    """A page of another site sent this request with the user's browser."""

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
    _require_own_origin(public.netloc)
    if settings.api_key is not None and request.path not in WITHOUT_KEY:
        _require_key(settings.api_key)


def may_send(key: str | None, authorization: str) -> bool:
    """Whether a client with this Authorization header may send requests with a body."""
    return key is None or _is_same(key_in(authorization), key)


def link_to(path: str, **query: str) -> str:
    """Return the URL of a GET of this host as the client of the current request reaches it.

    On a host with a key it is signed, and needs no key until it expires.
    """
    settings = current_app.extensions["host"].settings
    if settings.api_key is not None:
        query["expires"] = str(int(time.time()) + LINK_S)
        query["signature"] = _signature(settings.api_key, path, query)
    base = settings.public_url or request.url_root.rstrip("/")
    return f"{base}{path}{'?' if query else ''}{urlencode(query)}"


def _signature(key: str, path: str, query: Mapping[str, str]) -> str:
    """Return the signature of a GET of this path with this query."""
    items = sorted((name, value) for name, value in query.items() if name != "signature")
    return hmac.new(
        _link_key(key), f"{path}?{urlencode(items)}".encode(), hashlib.sha256
    ).hexdigest()


@cache
def _link_key(key: str) -> bytes:
    """Return the key that signs links. It is slow to derive: whoever has a signed link could
    otherwise guess API keys and check each guess against it.
    """
    return hashlib.scrypt(key.encode(), salt=b"links of diffusion-launcher", n=2**14, r=8, p=1)


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
            "address that browsers show."
        )


def _require_key(key: str) -> None:
    signature = request.args.get("signature")
    if may_send(key, request.headers.get("Authorization", "")) or (
        signature is not None and _is_signed(key, signature)
    ):
        return
    if signature is not None:
        raise KeyMissing(
            f"this link has expired, or was changed. Links are valid for {LINK_S // 3600} hours; "
            "fetch the result with the key."
        )
    raise KeyMissing(
        "this host wants its key. Send it as 'Authorization: Bearer KEY', or as the password of "
        "Basic authentication with any user name."
    )


def _is_signed(key: str, signature: str) -> bool:
    """Whether this request is a GET of a link of `link_to` that has not expired."""
    query = request.args.to_dict()
    expires = query.get("expires", "")
    is_valid = re.fullmatch(r"\d{1,12}", expires, re.ASCII) and time.time() < int(expires)
    is_own = _is_same(signature, _signature(key, request.path, query))
    return request.method in ("GET", "HEAD") and bool(is_valid) and is_own


def _is_same(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), secret.encode())


def _require_content_type(dialect: Dialect) -> None:
    has_no_body = dialect.is_body_optional and request.content_length in (0, None)
    if request.mimetype not in dialect.media_types and not has_no_body:
        raise UnsupportedMediaType(
            f"Content-Type {request.mimetype or '(none)'!r} is not allowed. Send "
            f"{' or '.join(dialect.media_types)}."
        )


class BehindProxies:
    """WSGI middleware: shows requests as their clients sent them to the outermost trusted proxy.

    X-Forwarded-For, -Proto, -Host and -Prefix are read from trusted addresses only. In each the
    last value counts, which the proxy itself has written. A path prefix, also that of --public_url,
    may be sent on or not.
    """

    def __init__(self, app: Callable[..., Iterable[bytes]], settings: Settings) -> None:
        self._app = app
        self._trusted = [ipaddress.ip_network(each) for each in settings.trusted_proxies or ()]
        self._prefix = urlsplit(settings.public_url or "").path
        self._has_warned = False

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        sender = environ.get("REMOTE_ADDR", "")
        sent = {
            name: environ.pop(f"HTTP_X_FORWARDED_{name}")
            for name in FORWARDED
            if f"HTTP_X_FORWARDED_{name}" in environ
        }
        if sent and not self._is_trusted(sender):
            self._warn(sender, sent)
            sent = {}
        last = {name: value.rpartition(",")[2].strip() for name, value in sent.items()}
        if last.get("PROTO") in ("http", "https"):
            environ["wsgi.url_scheme"] = last["PROTO"]
        if last.get("HOST"):
            environ["HTTP_HOST"] = last["HOST"]
        if "FOR" in sent:
            environ["REMOTE_ADDR"] = self._client(sender, sent["FOR"])
        _move_prefix(environ, last.get("PREFIX", "").rstrip("/") or self._prefix)
        return self._app(environ, start)

    def _is_trusted(self, address: str) -> bool:
        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(found in network for network in self._trusted)

    def _client(self, sender: str, forwarded_for: str) -> str:
        """Return the last address that is not a trusted proxy's: it was seen by one that is."""
        client = sender
        for address in reversed([each.strip() for each in forwarded_for.split(",")]):
            if not self._is_trusted(client):
                break
            client = address
        return client

    def _warn(self, sender: str, sent: Iterable[str]) -> None:
        if not self._has_warned:
            names = ", ".join(f"X-Forwarded-{name.title()}" for name in sent)
            logger.warning(
                "a request from %s has %s, which is not read. If that is your proxy, start the "
                "host with --trusted_proxies=%s",
                sender,
                names,
                sender,
            )
        self._has_warned = True


def _move_prefix(environ: dict[str, Any], prefix: str) -> None:
    """Make the prefix part of the application's root, and take it off the path if it is there."""
    if not re.fullmatch(r"(/[\w.~-]+)+", prefix, re.ASCII) or environ.get("SCRIPT_NAME"):
        return
    environ["SCRIPT_NAME"] = prefix
    path = environ.get("PATH_INFO", "")
    if path == prefix or path.startswith(f"{prefix}/"):
        environ["PATH_INFO"] = path[len(prefix) :] or "/"

"""create_app: routes and error handlers around a queue and a state. Nothing happens at import; imports no torch."""

import logging
from dataclasses import dataclass
from urllib.parse import urlsplit

from flask import Flask, Response, current_app, jsonify, request
from werkzeug.exceptions import HTTPException

from backends.errors import (
    BusyError,
    CancelledError,
    ConfigError,
    HostError,
    NotFoundError,
    PlanError,
    RequestError,
    UnavailableError,
    UnsupportedError,
)
from backends.model_table import ModelSpec
from hosts import a1111, api, openai, pages, routes
from hosts.compat import routes as compat_routes
from hosts.jobs import JobQueue
from hosts.settings import Settings
from hosts.state import HostState

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 512 * 1024 * 1024
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
WILDCARDS = frozenset({"0.0.0.0", "::"})

STATUS = {
    RequestError: 400,
    UnsupportedError: 422,
    PlanError: 422,
    ConfigError: 503,
    UnavailableError: 503,
    NotFoundError: 404,
    BusyError: 429,
    CancelledError: 409,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What routes may touch: `current_app.extensions["host"]`."""

    settings: Settings
    spec: ModelSpec
    queue: JobQueue
    state: HostState


def create_app(host: Host) -> Flask:
    """The WSGI application of rank 0."""
    app = Flask("hosts", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES
    app.extensions["host"] = host
    app.register_blueprint(routes.blueprint)
    app.register_blueprint(api.blueprint)
    app.register_blueprint(pages.blueprint)
    app.register_blueprint(openai.blueprint)
    app.register_blueprint(a1111.blueprint)
    app.register_blueprint(compat_routes.blueprint)
    app.before_request(_refuse_foreign_pages)
    app.register_error_handler(HostError, _host_error)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _unexpected_error)
    return app


def error_body(message: str) -> dict[str, object]:
    """The four keys that both existing clients look for, on every error."""
    return {"message": message, "output": None, "latent": None, "is_image": False}


def status_of(error: HostError) -> int:
    return next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)


def _refuse_foreign_pages() -> None:
    """A page of another site may resolve its own name to this address (DNS rebinding): only names of this host are served."""
    allowed = LOOPBACK_NAMES | {current_app.extensions["host"].settings.host}
    name = urlsplit(f"//{request.host}").hostname or ""
    if name not in allowed and not allowed & WILDCARDS:
        raise RequestError(f"Host {name!r} is not served here. Allowed: {', '.join(sorted(allowed))}.", field="Host")
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != request.host:
        raise ForeignOrigin(f"Origin {origin!r} is not served here. Allowed: this host's own page, and clients that are no browsers.")
    kinds = openai.FORM_TYPES if request.blueprint == openai.blueprint.name else ("application/json",)
    if request.method == "POST" and request.mimetype not in kinds and not _has_no_body():
        raise UnsupportedMediaType(f"Content-Type {request.mimetype or '(none)'!r} is not allowed. Send {' or '.join(kinds)}.")


def _has_no_body() -> bool:
    """Some POSTs of other dialects say everything in their path."""
    return request.content_length in (0, None) and request.blueprint == a1111.blueprint.name


class UnsupportedMediaType(HTTPException):
    """werkzeug's own text would not say what to send."""

    code = 415


class ForeignOrigin(HTTPException):
    """A page of another site sends requests with the user's browser."""

    code = 403


def _answer(message: str, status: int) -> tuple[Response, int]:
    """In the dialect of the path that was asked."""
    shape = {openai.blueprint.name: openai.error_body, a1111.blueprint.name: a1111.error_body}.get(request.blueprint or "")
    return jsonify(shape(message, status) if shape else error_body(message)), status


def _host_error(error: HostError) -> tuple[Response, int]:
    return _answer(str(error), status_of(error))


def _http_error(error: HTTPException) -> tuple[Response, int]:
    return _answer(f"{error.name}: {error.description}" if error.name else str(error.description), error.code or 500)


def _unexpected_error(error: Exception) -> tuple[Response, int]:
    logger.exception("a request failed")
    return _answer(f"internal error: {type(error).__name__}. The log of rank 0 says more.", 500)

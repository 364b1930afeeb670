"""Errors as HTTP responses: a status for each type, a body for each dialect."""

import logging
import math

from flask import Flask, Response, current_app, jsonify, request
from werkzeug.exceptions import (
    HTTPException,
    MethodNotAllowed,
    NotFound,
    RequestEntityTooLarge,
)

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
from hosts.http.dialect import dialect_of

logger = logging.getLogger(__name__)

STATUS: dict[type[HostError], int] = {
    RequestError: 400,
    UnsupportedError: 422,
    PlanError: 422,
    UnavailableError: 503,
    ConfigError: 503,
    NotFoundError: 404,
    BusyError: 429,
    CancelledError: 409,
}
"""Error type -> status. Where two types share one, a gateway reads it back as the first (KINDS)."""
KINDS: dict[int, type[HostError]] = {
    status: kind for kind, status in reversed(list(STATUS.items()))
}
RETRY_AFTER_S = {429: 5, 503: 10}
"""Status of a temporary refusal -> seconds until a retry. Loading takes longer than waiting in
the queue.
"""


def handle_errors(app: Flask) -> None:
    """Answer every error with its message and status, in the dialect of the path."""
    app.register_error_handler(HostError, answer_host_error)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _unexpected_error)


def status_of(error: HostError) -> int:
    return next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)


def error_of(status: int, message: str) -> HostError:
    """Return the error that another host answered with this status."""
    return KINDS.get(status, HostError)(message)


def answer_error(message: str, status: int, *, field: str | None = None) -> tuple[Response, int]:
    """Return the response in the dialect of the requested path."""
    dialect = dialect_of(request.path, current_app.extensions["dialects"])
    return jsonify(dialect.error_body(message, status, field)), status


def field_of(error: HostError) -> str | None:
    """Return the field at fault under the name that the client sent."""
    field = getattr(error, "field", None)
    return field if field and field in str(error) else None


def answer_host_error(error: HostError) -> tuple[Response, int]:
    """Return the response to a request that failed with this error."""
    answer, status = answer_error(str(error), status_of(error), field=field_of(error))
    wait_s = getattr(error, "retry_after_s", None) or RETRY_AFTER_S.get(status)
    if wait_s is not None:
        answer.headers["Retry-After"] = str(math.ceil(wait_s))
    return answer, status


def _http_error(error: HTTPException) -> tuple[Response, int]:
    if isinstance(error, RequestEntityTooLarge):
        megabytes = current_app.config["MAX_CONTENT_LENGTH"] // 10**6
        return answer_error(
            f"the body is larger than this host allows: {megabytes} MB (--max_body_mb). Send less.",
            413,
        )
    if isinstance(error, NotFound | MethodNotAllowed):
        return answer_error(
            f"there is no {request.method} {request.path[:200]} here. GET /docs lists what there "
            "is.",
            error.code,
        )
    message = f"{error.name}: {error.description}" if error.name else str(error.description)
    answer, status = answer_error(message, error.code or 500)
    for scheme in getattr(error, "offers", ()):
        answer.headers.add("WWW-Authenticate", scheme)
    return answer, status


def _unexpected_error(error: Exception) -> tuple[Response, int]:
    logger.exception("a request failed")
    return answer_error(
        f"internal error: {type(error).__name__}. The log of rank 0 says more.", 500
    )

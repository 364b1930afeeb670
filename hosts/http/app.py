"""create_app: routes and error handlers around a queue and a state. Nothing happens at import;
imports no torch.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from flask import Blueprint, Flask, Response, current_app, jsonify, request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

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
from hosts.http import a1111, access, health, jobs_api, openai
from hosts.http.limits import RateLimit
from hosts.http.metrics import Metrics
from hosts.http.page import routes as page_routes
from hosts.jobs.queue import JobQueue
from hosts.launch.settings import Settings
from hosts.supervision.host_state import HostState

logger = logging.getLogger(__name__)

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

RETRY_AFTER_S = {429: 5, 503: 10}
"""Status of a refusal that passes -> seconds after which to ask again. Loading takes longer than a
queue to move on.
"""


class ClientProtocol(Protocol):
    """What the existing clients may ask of this host (hosts/compat/protocol.py)."""

    blueprints: tuple[Blueprint, ...]

    def fields(self, body: Mapping[str, Any]) -> Mapping[str, Any]: ...

    def percent(self, queue: JobQueue, state: HostState) -> float: ...

    def require_pipeline(self, state: HostState) -> None: ...


@dataclass(slots=True, kw_only=True)
class Host:
    """What routes may touch: `current_app.extensions["host"]`. Settings and spec change where the
    pipeline is loaded over HTTP.

    name: of the model for clients that name one; its type if empty.
    """

    settings: Settings
    spec: ModelSpec
    queue: JobQueue
    state: HostState
    protocol: ClientProtocol
    name: str = ""

    @property
    def model(self) -> str:
        return self.name or self.spec.name


def create_app(host: Host) -> Flask:
    """The WSGI application of rank 0."""
    app = Flask("hosts", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = host.settings.max_body_mb * 10**6
    app.extensions["rate"] = RateLimit(host.settings.rate_limit)
    app.extensions["host"] = host
    app.extensions["metrics"] = Metrics(host.queue, host.state)
    for dialect in (health, jobs_api, page_routes, openai, a1111):
        app.register_blueprint(dialect.blueprint)
    for blueprint in host.protocol.blueprints:
        app.register_blueprint(blueprint)
    app.before_request(access.refuse_strangers)
    handle_errors(app)
    return app


def handle_errors(app: Flask) -> None:
    """Every error is answered with its message and its status, in the dialect of the path."""
    app.register_error_handler(HostError, _host_error)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _unexpected_error)


def error_body(message: str) -> dict[str, object]:
    """The four keys that both existing clients look for, on every error."""
    return {"message": message, "output": None, "latent": None, "is_image": False}


def status_of(error: HostError) -> int:
    return next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)


def _answer(message: str, status: int) -> tuple[Response, int]:
    """In the dialect of the path that was asked."""
    shape = {openai.blueprint.name: openai.error_body, a1111.blueprint.name: a1111.error_body}.get(
        request.blueprint or ""
    )
    return jsonify(shape(message, status) if shape else error_body(message)), status


def _host_error(error: HostError) -> tuple[Response, int]:
    answer, status = _answer(str(error), status_of(error))
    wait_s = getattr(error, "retry_after_s", None) or RETRY_AFTER_S.get(status)
    if wait_s is not None:
        answer.headers["Retry-After"] = str(math.ceil(wait_s))
    return answer, status


def _http_error(error: HTTPException) -> tuple[Response, int]:
    if isinstance(error, RequestEntityTooLarge):
        megabytes = current_app.extensions["host"].settings.max_body_mb
        return _answer(
            f"the body is larger than this host allows: {megabytes} MB (--max_body_mb). Send less.",
            413,
        )
    return _answer(
        f"{error.name}: {error.description}" if error.name else str(error.description),
        error.code or 500,
    )


def _unexpected_error(error: Exception) -> tuple[Response, int]:
    logger.exception("a request failed")
    return _answer(f"internal error: {type(error).__name__}. The log of rank 0 says more.", 500)

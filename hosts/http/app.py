"""create_app: routes and error handlers around a queue and a state. Importing has no effect. No
torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from flask import Flask

from backends.model_table import ModelSpec
from hosts.http import access, health, jobs_api, schema
from hosts.http.dialect import Dialect
from hosts.http.errors import handle_errors
from hosts.http.limits import RateLimit
from hosts.http.metrics import Metrics
from hosts.http.page import routes as page
from hosts.http.server import Listener
from hosts.jobs.queue import JobQueue
from hosts.launch.settings import Settings
from hosts.supervision.host_state import HostState

OWN = (
    health.DIALECT,
    jobs_api.DIALECT,
    Dialect(blueprint=page.blueprint),
    Dialect(blueprint=schema.blueprint),
)
"""Dialects of every host."""

SPARE_THREADS = 16
"""For requests that are answered at once, while as many wait as can."""


class ClientProtocol(Protocol):
    """Behaviour that depends on the protocol of existing clients (hosts/compat/protocol.py)."""

    dialects: tuple[Dialect, ...]

    def fields(self, body: Mapping[str, Any]) -> Mapping[str, Any]: ...

    def percent(self, queue: JobQueue, state: HostState) -> float: ...

    def require_pipeline(self, state: HostState) -> None: ...


@dataclass(slots=True, kw_only=True)
class Host:
    """Objects that routes may use: `current_app.extensions["host"]`."""

    settings: Settings
    """The launch arguments, or those of a model loaded over HTTP."""
    spec: ModelSpec
    """Model type."""
    queue: JobQueue
    """Waiting, running and finished jobs."""
    state: HostState
    """Phase of the host."""
    protocol: ClientProtocol
    """Protocol of existing clients."""
    name: str = ""
    """Name of the model for clients that name one; its type if empty."""

    @property
    def model(self) -> str:
        return self.name or self.spec.name


def create_app(host: Host) -> Flask:
    """Return the WSGI application of rank 0."""
    app = Flask("hosts", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = host.settings.max_body_mb * 10**6
    app.extensions["rate"] = RateLimit(host.settings.rate_limit)
    app.extensions["host"] = host
    app.extensions["metrics"] = Metrics(host.queue, host.state)
    app.extensions["dialects"] = (*OWN, *host.protocol.dialects)
    for dialect in app.extensions["dialects"]:
        app.register_blueprint(dialect.blueprint)
    app.wsgi_app = access.BehindProxies(app.wsgi_app, host.settings)
    app.before_request(access.refuse_strangers)
    handle_errors(app)
    return app


def listen(app: Flask, settings: Settings, *, num_jobs: int) -> Listener:
    """Return the listener of an application, with a thread for each request that may wait.

    num_jobs: how many may wait or run. The listener is not bound yet.
    """
    return Listener(
        app,
        host=settings.host,
        port=settings.port,
        max_body=settings.max_body_mb * 10**6,
        admits=partial(access.may_send, settings.api_key),
        num_threads=num_jobs + jobs_api.MAX_STREAMS + SPARE_THREADS,
    )

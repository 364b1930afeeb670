"""create_app: routes and error handlers around a queue and a state. Importing has no effect. No
torch.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from flask import Flask

from backends.errors import ConfigError, NotFoundError
from backends.model_table import ModelSpec
from hosts.http import access, health, jobs_api, schema
from hosts.http.decode import Accepted
from hosts.http.dialect import Dialect
from hosts.http.errors import handle_errors
from hosts.http.identity.keys import Keys
from hosts.http.identity.proxies import BehindProxies
from hosts.http.limits import RateLimit
from hosts.http.metrics import Metrics
from hosts.http.page import routes as page
from hosts.http.server import Listener
from hosts.jobs.queue import Job, JobQueue
from hosts.jobs.store import Store
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

    def application(self, hosts: "Sequence[Host]", store: Store) -> Flask: ...

    def fields(self, body: Mapping[str, Any]) -> Mapping[str, Any]: ...

    def percent(self, queue: JobQueue, state: HostState, *, owner: str | None) -> float: ...

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
    fixed_loras: str = ""
    """Why requests cannot choose LoRAs; empty if they can."""
    name: str = ""
    """Name of the model for clients that name one; its type if empty."""
    others: Mapping[str, str] = field(default_factory=dict)
    """Where clients can choose: name -> type of every model at this address, the default first."""

    @property
    def model(self) -> str:
        return self.name or self.spec.name

    @property
    def models(self) -> tuple[str, ...]:
        """Return the names of the models at this address, the default first."""
        return tuple(self.others) or (self.model,)

    @property
    def accepted(self) -> Accepted:
        """Return what requests may hold, as the settings are now."""
        return Accepted.by(self.settings, model=self.name or None, fixed_loras=self.fixed_loras)

    def has(self, job_id: str) -> bool:
        """Return whether a job can be looked up that is for this model."""
        with contextlib.suppress(NotFoundError):
            return self.is_of(self.queue.find(job_id, owner=None))
        return False

    def is_of(self, job: Job) -> bool:
        """Return whether a job of the queue is for this model."""
        return job.request.model in (None, self.name)

    def facts_for(self, job: Job) -> Mapping[str, Any]:
        """Return what the ranks are set to, unless another model is loaded than the job's."""
        facts = self.state.facts
        return facts if facts.get("model", job.request.model) == job.request.model else {}

    def type_of(self, job: Job) -> str:
        return self.others.get(job.request.model or "", self.spec.name)


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
    app.extensions["keys"] = keys_of(host.settings)
    app.wsgi_app = BehindProxies(app.wsgi_app, host.settings)
    app.before_request(access.refuse_strangers)
    app.after_request(access.let_browsers_read)
    handle_errors(app)
    return app


def keys_of(settings: Settings) -> Keys:
    """Return the keys that clients may bring. ConfigError if their file has become wrong."""
    try:
        return Keys(settings.api_key, settings.api_keys)
    except ValueError as error:
        raise ConfigError(f"--api_keys={settings.api_keys} is not allowed. {error}.") from error


def listen(app: Flask, settings: Settings, *, num_jobs: int) -> Listener:
    """Return the listener of an application, with a thread for each request that may wait.

    num_jobs: how many may wait or run. The listener is not bound yet.
    """
    return Listener(
        app,
        host=settings.host,
        port=settings.port,
        max_body=settings.max_body_mb * 10**6,
        admits=app.extensions["keys"].admits,
        num_threads=num_jobs + jobs_api.MAX_STREAMS + SPARE_THREADS,
    )

"""create_app: routes and error handlers around a queue and a state. Nothing happens at import;
imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from flask import Flask

from backends.model_table import ModelSpec
from hosts.http import access, health, jobs_api, schema
from hosts.http.dialect import Dialect
from hosts.http.errors import handle_errors
from hosts.http.limits import RateLimit
from hosts.http.metrics import Metrics
from hosts.http.page import routes as page
from hosts.jobs.queue import JobQueue
from hosts.launch.settings import Settings
from hosts.ranks.model_control import ModelControl
from hosts.supervision.host_state import HostState

OWN = (
    health.DIALECT,
    jobs_api.DIALECT,
    Dialect(blueprint=page.blueprint),
    Dialect(blueprint=schema.blueprint),
)
"""What every host speaks."""


@dataclass(slots=True, kw_only=True)
class Host:
    """What routes may touch: `current_app.extensions["host"]`."""

    settings: Settings
    """The launch arguments; with `control`, those of the model that is loaded now."""
    spec: ModelSpec
    """The type of the model."""
    queue: JobQueue
    """The jobs that wait, run and are over."""
    state: HostState
    """The phase of the host."""
    control: ModelControl | None = None
    """Loads and changes the model over HTTP; None where it is fixed at launch."""
    name: str = ""
    """The model's name for clients that name one; its type if empty."""

    @property
    def model(self) -> str:
        return self.name or self.spec.name


def create_app(host: Host, dialects: Sequence[Dialect]) -> Flask:
    """Return the WSGI application of rank 0. dialects: those that it speaks beside its own."""
    app = Flask("hosts", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = host.settings.max_body_mb * 10**6
    app.extensions["rate"] = RateLimit(host.settings.rate_limit)
    app.extensions["host"] = host
    app.extensions["metrics"] = Metrics(host.queue, host.state)
    app.extensions["dialects"] = (*OWN, *dialects)
    for dialect in app.extensions["dialects"]:
        app.register_blueprint(dialect.blueprint)
    app.before_request(access.refuse_strangers)
    handle_errors(app)
    return app

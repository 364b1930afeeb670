"""The gateway's HTTP application: one host's API for all models.

It finds the model of a request and forwards the request to that model's application.
"""

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flask import Blueprint, Flask, Response, current_app, jsonify, request
from werkzeug import Request

from backends.errors import NotFoundError
from hosts.cluster.deployment import Deployment
from hosts.cluster.metrics import merged
from hosts.compat.protocol import FixedModel
from hosts.compat.routes import initialized
from hosts.dialects import openai
from hosts.http import access, jobs_api
from hosts.http.app import OWN
from hosts.http.errors import handle_errors
from hosts.http.health import PLAIN_TEXT
from hosts.http.limits import RateLimit
from hosts.http.metrics import CONTENT_TYPE
from hosts.supervision.host_state import Phase

blueprint = Blueprint("gateway", __name__)

METHODS = ("GET", "POST", "PUT", "DELETE", "OPTIONS")
BY_ID = ("/v1/jobs/", "/v1/videos/")
SERVING = (Phase.LOADING, Phase.READY)
WORST_FIRST = (Phase.STOPPING, Phase.FAILED, Phase.LOADING, Phase.EMPTY, Phase.READY)


@dataclass(frozen=True, slots=True)
class Gateway:
    """Objects that routes may use: `current_app.extensions["gateway"]`.

    The first deployment is the default.
    """

    deployments: Sequence[Deployment]

    def worst(self) -> Deployment:
        return min(
            self.deployments, key=lambda deployment: WORST_FIRST.index(deployment.state.phase)
        )

    def of_job(self, job_id: str) -> Deployment:
        """Return the deployment of this job, or the default if the job is unknown."""
        for deployment in self.deployments:
            with contextlib.suppress(NotFoundError):
                deployment.queue.find(job_id)
                return deployment
        return self.deployments[0]

    def of_model(self, name: str) -> Deployment:
        """Return the deployment of this name. NotFoundError if there is none."""
        found = next(
            (deployment for deployment in self.deployments if deployment.name == name), None
        )
        if found is None:
            raise NotFoundError(
                f"there is no model {name!r}. Allowed: "
                f"{', '.join(each.name for each in self.deployments)}."
            )
        return found


def create_gateway(deployments: Sequence[Deployment]) -> Flask:
    """Return the WSGI application in front of those of the deployments."""
    settings = deployments[0].plan.settings
    app = Flask("hosts.cluster", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_mb * 10**6
    app.extensions["gateway"] = Gateway(deployments)
    app.extensions["host"] = deployments[0].app.extensions["host"]
    app.extensions["dialects"] = (*OWN, *FixedModel.dialects)
    shared = RateLimit(settings.rate_limit)
    for deployment in deployments:
        deployment.app.extensions["rate"] = shared
    app.register_blueprint(blueprint)
    app.wsgi_app = access.BehindProxies(app.wsgi_app, settings)
    app.before_request(lambda: access.refuse_unknown(settings))
    handle_errors(app)
    return app


@blueprint.get("/cluster")
def cluster() -> Response:
    """Return the models, their replicas and the state of each."""
    return jsonify(
        {"deployments": [deployment.describe() for deployment in _gateway().deployments]}
    )


@blueprint.delete("/cluster/replicas/<name>")
def drain(name: str) -> tuple[Response, int]:
    """Drain a replica: it takes no more jobs and ends after its current ones.

    Another one replaces it if it is needed.
    """
    replicas = [replica for deployment in _gateway().deployments for replica in deployment.replicas]
    found = next((replica for replica in replicas if replica.name == name), None)
    if found is None:
        raise NotFoundError(
            f"there is no replica {name!r}. Allowed: "
            f"{', '.join(replica.name for replica in replicas)}."
        )
    found.drain()
    return jsonify(found.describe()), 202


@blueprint.get("/metrics")
def metrics() -> Response:
    """Return the metrics of all replicas and of the gateway, for Prometheus."""
    return Response(merged(_gateway().deployments), content_type=CONTENT_TYPE)


@blueprint.get("/healthz")
def healthz() -> tuple[Response, int]:
    """Return the phase of the model in the worst state, and the waiting jobs of all models."""
    state = _gateway().worst().state
    waiting = sum(deployment.queue.num_waiting for deployment in _gateway().deployments)
    return jsonify(
        {"phase": state.phase, "reason": state.reason, "waiting": waiting}
    ), 200 if state.phase in SERVING else 503


@blueprint.get("/readyz")
def readyz() -> Response:
    """Return 200 while every model has a ready replica."""
    phase = _gateway().worst().state.phase
    status = 200 if phase is Phase.READY else 503
    return Response(phase.value, status=status, content_type=PLAIN_TEXT)


@blueprint.get("/initialize")
def initialize() -> Response:
    """Return 202 until every model is ready, which old clients wait for."""
    return initialized(_gateway().worst().state.phase)


@blueprint.get("/v1/models")
def models() -> Response:
    """Return all models, the default first."""
    return jsonify(
        {
            "object": "list",
            "data": [openai.model_of(deployment.name) for deployment in _gateway().deployments],
        }
    )


@blueprint.get("/v1/jobs")
def jobs() -> Response:
    """Return the jobs of all models."""
    found: list[dict[str, Any]] = []
    for deployment in _gateway().deployments:
        with deployment.app.app_context():
            found += jobs_api.without_settings(deployment.queue.jobs())
    return jsonify({"jobs": found})


@blueprint.route("/", defaults={"path": ""}, methods=METHODS)
@blueprint.route("/<path:path>", methods=METHODS)
def forward(path: str) -> Response:
    """Forward any other request to the model's application."""
    gateway = _gateway()
    environ = dict(request.environ)
    if len(gateway.deployments) == 1:
        return Response.from_app(gateway.deployments[0].app, environ)
    if request.path.startswith(BY_ID):
        return Response.from_app(gateway.of_job(request.path.split("/")[3]).app, environ)
    body = request.get_data(parse_form_data=False) if request.method == "POST" else b""
    name = _named_model(body)
    deployment = gateway.of_model(name) if name else gateway.deployments[0]
    return Response.from_app(deployment.app, {**environ, "wsgi.input": io.BytesIO(body)})


def _named_model(body: bytes) -> str | None:
    """Return the model that the request names, or None.

    It may be in the query, the JSON, the form, or where the A1111 web interface puts it.
    """
    if name := request.args.get("model"):
        return name
    if request.mimetype == "multipart/form-data":
        return Request({**request.environ, "wsgi.input": io.BytesIO(body)}).form.get("model")
    if request.mimetype != "application/json" or not body:
        return None
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        return None  # the model's application reports what is wrong with it
    override = content.get("override_settings")
    name = content.get("model") or (
        override.get("sd_model_checkpoint") if isinstance(override, dict) else None
    )
    return str(name) if name else None


def _gateway() -> Gateway:
    return current_app.extensions["gateway"]

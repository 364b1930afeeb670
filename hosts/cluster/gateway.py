"""The gateway's HTTP application: one host's API for all models.

What it does not answer itself goes to the application of the model that a request names
(hosts/dialects/models.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flask import Blueprint, Flask, Response, current_app, jsonify

from backends.errors import NotFoundError
from hosts.cluster.deployment import Deployment
from hosts.cluster.metrics import merged
from hosts.compat.routes import initialized
from hosts.dialects.models import create_front
from hosts.http import access, jobs_api
from hosts.http.health import PLAIN_TEXT
from hosts.http.identity.sender import seen_owner
from hosts.http.metrics import CONTENT_TYPE
from hosts.jobs.store import NoStore
from hosts.supervision.host_state import Phase

blueprint = Blueprint("gateway", __name__)

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


def create_gateway(deployments: Sequence[Deployment]) -> Flask:
    """Return the WSGI application in front of those of the deployments."""
    apps = {deployment.name: deployment.app for deployment in deployments}
    front = create_front(apps, NoStore(), own=blueprint)
    front.extensions["gateway"] = Gateway(deployments)
    return front


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
    access.require_operator()
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


@blueprint.get("/v1/jobs")
def jobs() -> Response:
    """Return the sender's jobs of all models."""
    jobs_api.require_known_query()
    found: list[dict[str, Any]] = []
    owner = seen_owner()
    for deployment in _gateway().deployments:
        with deployment.app.app_context():
            found += jobs_api.without_settings(deployment.queue.jobs(owner=owner))
    return jsonify({"jobs": found})


def _gateway() -> Gateway:
    return current_app.extensions["gateway"]

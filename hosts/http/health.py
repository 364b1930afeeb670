"""Our own API: health, metrics and settings."""

from flask import Blueprint, Response, current_app, jsonify

from backends.errors import UnsupportedError
from hosts.http.access import require_operator
from hosts.http.dialect import Dialect
from hosts.http.metrics import CONTENT_TYPE
from hosts.supervision.host_state import Phase

PLAIN_TEXT = "text/plain; charset=utf-8"
"""Of what is no page: a reason may hold what a client sent."""
blueprint = Blueprint("api", __name__)
DIALECT = Dialect(blueprint=blueprint)


@blueprint.get("/healthz")
def healthz() -> tuple[Response, int]:
    """Return 200 while the host is loading or ready, 503 once it cannot generate images."""
    host = current_app.extensions["host"]
    body = {
        "phase": host.state.phase,
        "reason": host.state.reason,
        "waiting": host.queue.num_waiting,
    }
    return jsonify(body), 200 if host.state.phase in (
        Phase.LOADING,
        Phase.EMPTY,
        Phase.READY,
    ) else 503


@blueprint.get("/livez")
def livez() -> tuple[str, int]:
    """Return 200 as long as this process responds."""
    return "OK", 200


@blueprint.get("/readyz")
def readyz() -> Response:
    """Return 200 while images can be generated, else 503 with the phase and its reason."""
    state = current_app.extensions["host"].state
    text = ": ".join(filter(None, (state.phase.value, state.reason)))
    return Response(
        text, status=200 if state.phase is Phase.READY else 503, content_type=PLAIN_TEXT
    )


@blueprint.get("/metrics")
def metrics() -> Response:
    """Return metrics for Prometheus."""
    return Response(current_app.extensions["metrics"].text(), content_type=CONTENT_TYPE)


@blueprint.post("/measure")
def measure() -> Response:
    """Time the methods again, compare an image of each approximate one with one rank's, and choose
    by the new figures. Return the table when it is done; jobs wait meanwhile.
    """
    require_operator()
    host = current_app.extensions["host"]
    if host.state.measure is None:
        raise UnsupportedError(
            "a gateway has no methods to measure. Ask the host of a replica for it."
        )
    host.state.measure()
    return jsonify(host.state.facts["planner"])


@blueprint.get("/settings")
def settings() -> Response:
    """Return the launch arguments, the choices made with reasons, and figures of the last image."""
    host = current_app.extensions["host"]
    return jsonify({"type": host.spec.name, "given": host.settings.given, **host.state.facts})

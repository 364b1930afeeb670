"""Our own API: health and settings."""

from flask import Blueprint, Response, current_app, jsonify

from hosts.state import Phase

blueprint = Blueprint("api", __name__)


@blueprint.get("/healthz")
def healthz() -> tuple[Response, int]:
    """200 while the host can answer or is loading, 503 once it cannot make pictures."""
    host = current_app.extensions["host"]
    body = {"phase": host.state.phase, "reason": host.state.reason, "waiting": host.queue.num_waiting}
    return jsonify(body), 200 if host.state.phase in (Phase.LOADING, Phase.READY) else 503


@blueprint.get("/settings")
def settings() -> Response:
    """What was given at launch, what was chosen and why, and figures of the last picture."""
    host = current_app.extensions["host"]
    return jsonify({"type": host.spec.name, "given": host.settings.given, **host.state.facts})

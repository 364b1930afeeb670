"""The door for existing clients: GET /initialize, GET /progress, POST /generate."""

import logging
from typing import Any

from flask import Blueprint, Response, current_app, jsonify, request
from werkzeug.exceptions import BadRequest

from backends.errors import RequestError
from backends.request import GenerateResult
from hosts import wire
from hosts.compat import codec
from hosts.compat.fields import read_request
from hosts.state import Phase

logger = logging.getLogger(__name__)
blueprint = Blueprint("compat", __name__)


@blueprint.get("/initialize")
def initialize() -> tuple[str, int]:
    """202 while loading. 200 also after a failed load: old clients poll until 200, and then read the reason from /generate."""
    phase = current_app.extensions["host"].state.phase
    return {Phase.LOADING: ("WAIT", 202), Phase.STOPPING: ("STOPPING", 503)}.get(phase, ("OK", 200))


@blueprint.get("/progress")
def progress() -> Response:
    """0 to 100 as text."""
    return Response(f"{current_app.extensions['host'].queue.percent:g}", mimetype="text/plain")


@blueprint.post("/generate")
def generate() -> Response:
    """One picture or video; waits its turn. The answer is the contract's JSON, or the file itself if Accept asks for one."""
    host = current_app.extensions["host"]
    asked = read_request(_json_body(), spec=host.spec, image_dirs=tuple(filter(None, (host.settings.image_dirs or "").split(":"))))
    content_type = _wanted_type(host.spec.output)
    result = host.queue.submit(asked).wait()
    if content_type != "application/json":
        return Response(wire.encode(result, content_type), mimetype=content_type, headers={"X-Seed": str(result.seed)})
    return jsonify(_legacy_body(result, returns_latents=host.spec.returns_latents, is_image=host.spec.output == "image"))


def _json_body() -> Any:
    try:
        return request.get_json()
    except BadRequest as error:
        raise RequestError(f"the body is not valid JSON: {error.description}") from error


def _wanted_type(output: str) -> str:
    """JSON unless the client prefers a file type that this kind of result has."""
    allowed = ["application/json", *(wire.IMAGE_TYPES if output == "image" else wire.VIDEO_TYPES)]
    best = request.accept_mimetypes.best_match(allowed)
    if best is None and request.accept_mimetypes:
        raise RequestError(f"Accept: {request.accept_mimetypes} is not available. Allowed: {', '.join(allowed)}.", field="Accept")
    return best or "application/json"


def _legacy_body(result: GenerateResult, *, returns_latents: bool, is_image: bool) -> dict[str, Any]:
    """ComfyUI unpacks two values exactly when `latent` is there, so it is there exactly for the types whose nodes want two."""
    frames = wire.pictures(result)
    body: dict[str, Any] = {
        "message": "OK",
        "output": codec.encode_image(frames[0]) if is_image else codec.encode_frames(frames),
        "is_image": is_image,
    }
    if returns_latents:
        body["latent"] = codec.encode_latents(result.latents)
    return body

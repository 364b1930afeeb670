"""The v1 protocol of the existing clients: GET /initialize, GET /progress, POST /generate."""

import logging
from typing import Any

from flask import Blueprint, Response, current_app, jsonify

from backends.errors import ConfigError, HostError
from backends.model_table import ModelSpec
from backends.request import GenerateResult
from hosts.compat import codec
from hosts.compat.fields import NAMES, is_existing_client, read_request
from hosts.http import media
from hosts.http.dialect import Dialect
from hosts.http.errors import answer_host_error, status_of
from hosts.http.health import PLAIN_TEXT
from hosts.http.identity.sender import seen_owner
from hosts.http.jobs_api import note_headers, require_model
from hosts.http.request_io import json_object, submit, wait_for, wanted_type
from hosts.supervision.host_state import Phase

logger = logging.getLogger(__name__)
PROMPTS = {name for field in ("prompt", "negative_prompt") for name in NAMES[field]}
"""Fields of which the log shows nothing, under all their names."""
blueprint = Blueprint("compat", __name__)
DIALECT = Dialect(blueprint=blueprint)


@blueprint.errorhandler(HostError)
def _refused(error: HostError) -> tuple[Response, int]:
    log_refusal(error)
    return answer_host_error(error)


def log_refusal(error: HostError) -> None:
    """Tell the log why a request is refused: existing clients show "check console", and throw the
    reason away. Failures of the ranks are in the log already.
    """
    field = getattr(error, "field", None)
    if status_of(error) < 500 or isinstance(error, ConfigError):
        logger.warning("refused: %s", f"{field} is not valid" if field in PROMPTS else error)


@blueprint.get("/initialize")
def initialize() -> Response:
    """Return 202 while loading, and 503 with the reason while another machine is awaited.

    Also 200 after a failed load: old clients poll until 200, then read the reason from /generate.
    """
    state = current_app.extensions["host"].state
    return initialized(state.phase, state.reason)


def initialized(phase: Phase, reason: str = "") -> Response:
    answers = {
        Phase.LOADING: ("WAIT", 202),
        Phase.WAITING: (reason, 503),
        Phase.STOPPING: ("STOPPING", 503),
    }
    text, status = answers.get(phase, ("OK", 200))
    return Response(text, status=status, content_type=PLAIN_TEXT)


@blueprint.get("/progress")
def progress() -> Response:
    """Return 0 to 100 as text: progress of the sender's job, or of loading on a host that loads
    over HTTP.
    """
    host = current_app.extensions["host"]
    percent = host.protocol.percent(host.queue, host.state, owner=seen_owner())
    return Response(f"{percent:g}", mimetype="text/plain")


@blueprint.post("/generate")
def generate() -> Response:
    """Generate one image or video, after the jobs before it.

    Returns the JSON that the existing clients read, or the file if Accept asks for one. If the
    client disconnects, the job is cancelled unless the body says "keep": true.
    """
    host = current_app.extensions["host"]
    sent = json_object()
    if not is_existing_client(sent):
        require_model(sent)
    body = host.protocol.fields(sent)
    renamed = {field: name for field, name in host.protocol.renamed.items() if name in sent}
    asked = read_request(body, spec=host.spec, accepted=host.accepted, renamed=renamed)
    content_type = wanted_type(host.spec.output, default="application/json")
    result = wait_for(submit(asked), is_kept=body.get("keep") is True)
    if content_type != "application/json":
        return Response(
            media.encode(media.each_image(result, host.spec.output)[0], content_type),
            mimetype=content_type,
            headers={"X-Seed": str(result.seed), **note_headers(result.report)},
        )
    answer = jsonify(legacy_body(result, spec=host.spec))
    answer.headers.update(note_headers(result.report))
    return answer


def legacy_body(result: GenerateResult, *, spec: ModelSpec) -> dict[str, Any]:
    """Return the JSON that existing clients read.

    ComfyUI unpacks two values exactly if `latent` is present, so only types whose nodes expect two
    values have it.
    """
    is_image = spec.output == "image"
    with current_app.extensions["metrics"].serialising():
        frames = media.images(result)
        body: dict[str, Any] = {
            "message": "OK",
            "output": codec.encode_image(frames[0]) if is_image else codec.encode_frames(frames),
            "is_image": is_image,
        }
        if spec.returns_latents and result.latents is not None:
            body["latent"] = codec.encode_latents(result.latents)
    return body

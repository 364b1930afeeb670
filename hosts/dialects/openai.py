"""OpenAI's images and videos API, for programs that speak nothing else. Its names, its answers and
its error shape.

Beside OpenAI's fields, requests may hold those of POST /generate by diffusers' names: seed,
negative_prompt, num_inference_steps, ...
"""

import base64
import io
import re
import time
from collections.abc import Mapping
from typing import Any

from flask import Blueprint, Response, current_app, jsonify, request
from PIL import Image

from backends.errors import NotFoundError, RequestError, UnsupportedError
from backends.request import GenerateRequest
from hosts.http import media
from hosts.http.decode import Accepted, read_request
from hosts.http.dialect import Dialect
from hosts.http.jobs_api import file_response
from hosts.http.request_io import client, json_object, seeds_from, submit_all, wait_for_all
from hosts.jobs.queue import Job, JobStatus
from hosts.supervision.host_state import Phase

blueprint = Blueprint("openai", __name__)

MAX_IMAGES = 10
ALIASES = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
STATUS = {
    JobStatus.QUEUED: "queued",
    JobStatus.RUNNING: "in_progress",
    JobStatus.DONE: "completed",
    JobStatus.FAILED: "failed",
    JobStatus.CANCELLED: "failed",
}
NUMBERS = frozenset(
    {
        "n",
        "seed",
        "steps",
        "num_inference_steps",
        "guidance",
        "guidance_scale",
        "strength",
        "clip_skip",
        "seconds",
        "num_frames",
    }
)


def error_body(message: str, status: int) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


DIALECT = Dialect(
    blueprint=blueprint,
    paths=("/v1/",),
    error_body=error_body,
    media_types=("application/json", "multipart/form-data"),
)


@blueprint.get("/v1/models")
def models() -> Response:
    """The one model that is loaded, if there is one."""
    return jsonify(
        {
            "object": "list",
            "data": [] if _host().state.phase is Phase.EMPTY else [model_of(_host().model)],
        }
    )


@blueprint.get("/v1/models/<name>")
def model(name: str) -> Response:
    if name != _host().model:
        raise NotFoundError(f"there is no model {name!r}. Allowed: {_host().model}.")
    return jsonify(model_of(name))


@blueprint.post("/v1/images/generations")
def generations() -> Response:
    """Text to image."""
    _require_output("image")
    return _images(json_object())


@blueprint.post("/v1/images/edits")
def edits() -> Response:
    """Image to image: `strength` says how much may change, 0.8 by default; with a mask only its
    transparent parts, by default wholly.
    """
    _require_output("image")
    body = _body()
    if "image" not in body:
        raise RequestError("image is missing. Send the image to change.", field="image")
    sent_as = "image" if "image" in _spec().requires else "init_image"
    rest = {name: value for name, value in body.items() if name not in ("image", "mask")}
    mask = {"mask_image": _mask(body["mask"])} if body.get("mask") else {}
    return _images({"strength": 1.0 if mask else 0.8, **rest, **mask, sent_as: body["image"]})


@blueprint.post("/v1/videos")
def create_video() -> Response:
    """A job; ask GET /v1/videos/<id> for its state and /content for the file."""
    _require_output("video")
    body = _body()
    fields = _fields(body)
    if "input_reference" in body:
        fields["image"] = body["input_reference"]
    if "seconds" in body and "num_frames" not in body:
        fields["num_frames"] = round(float(body["seconds"]) * media.FRAMES_PER_S)
    return jsonify(
        _video(_host().queue.submit(_read(fields), client=client(), is_kept=True, is_stored=True))
    )


@blueprint.get("/v1/videos/<job_id>")
def show_video(job_id: str) -> Response:
    return jsonify(_video(_host().queue.find(job_id)))


@blueprint.get("/v1/videos/<job_id>/content")
def video_content(job_id: str) -> Response:
    """MP4."""
    job = _host().queue.find(job_id)
    if not job.finished.is_set():
        raise RequestError(
            f"video {job_id!r} is not done. Ask GET /v1/videos/{job_id} until its status is "
            "completed."
        )
    return file_response(job, "video/mp4")


@blueprint.delete("/v1/videos/<job_id>")
def delete_video(job_id: str) -> Response:
    """Cancel it."""
    _host().queue.cancel(_host().queue.find(job_id))
    return jsonify({"id": job_id, "object": "video.deleted", "deleted": True})


def _images(body: Mapping[str, Any]) -> Response:
    number = body.get("n", 1)
    most = min(MAX_IMAGES, _host().settings.max_images)
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= most:
        raise RequestError(f"n={number!r} is not allowed. Allowed: 1 to {most}.", field="n")
    kind = _choice(body, "response_format", {"url": "url", "b64_json": "b64_json"}, "url")
    content_type = _choice(body, "output_format", FORMATS, "image/png")
    fields = _fields(body)
    seeds = seeds_from(fields.get("seed"), number)
    jobs = submit_all([_read({**fields, "seed": seed}) for seed in seeds], is_kept=True)
    results = wait_for_all(jobs)
    if kind == "url":
        data = [
            {"url": f"{request.host_url}v1/jobs/{job.id}/result", "seed": job.request.seed}
            for job in jobs
        ]
    else:
        files = [
            base64.b64encode(media.encode(result, content_type)).decode("ascii")
            for result in results
        ]
        data = [
            {"b64_json": file, "seed": job.request.seed}
            for file, job in zip(files, jobs, strict=True)
        ]
    return jsonify({"created": int(time.time()), "data": data})


def _fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's fields -> those of /generate. `model` must be the one that is loaded, or be left
    out.
    """
    named = body.get("model")
    if named not in (None, "", _host().model):
        raise NotFoundError(f"there is no model {named!r}. Allowed: {_host().model}.")
    fields = {
        ALIASES.get(name, name): value
        for name, value in body.items()
        if name not in ("model", "n", "size", "user", "seconds")
    }
    size = body.get("size")
    if size not in (None, "", "auto"):
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(size))
        if match is None:
            raise RequestError(
                f"size={size!r} is not allowed. Send WIDTHxHEIGHT, such as 1024x1024, or auto.",
                field="size",
            )
        fields["width"], fields["height"] = int(match[1]), int(match[2])
    return fields


def _body() -> dict[str, Any]:
    """JSON, or a form with files, whose texts are turned into numbers where numbers are meant."""
    if request.mimetype == "application/json":
        return dict(json_object())
    body: dict[str, Any] = {
        name: _number(name, value) if name in NUMBERS else value
        for name, value in request.form.items()
    }
    for name, file in request.files.items():
        body[name.removesuffix("[]")] = base64.b64encode(file.read()).decode("ascii")
    return body


def _mask(data: Any) -> Any:
    """base64 of an image whose transparent parts are to be changed -> of one in which these are
    white. One without alpha is such a one.
    """
    try:
        with Image.open(
            io.BytesIO(base64.b64decode(str(data).rpartition(",")[2], validate=True)),
            formats=["PNG", "WEBP"],
        ) as image:
            if not image.has_transparency_data:
                return data
            alpha = image.convert("RGBA").getchannel("A")
    except (OSError, ValueError, Image.DecompressionBombError):
        return data  # what is wrong with it is said where all images are read
    buffer = io.BytesIO()
    alpha.point(lambda value: 255 - value).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _number(name: str, text: str) -> float | int:
    try:
        return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
    except ValueError as error:
        raise RequestError(f"{name}={text!r} is not a number.", field=name) from error


def _choice(body: Mapping[str, Any], name: str, allowed: Mapping[str, str], default: str) -> str:
    value = body.get(name)
    if value is None:
        return default
    if value not in allowed:
        raise RequestError(
            f"{name}={value!r} is not allowed. Allowed: {', '.join(allowed)}.", field=name
        )
    return allowed[value]


def _read(fields: Mapping[str, Any]) -> GenerateRequest:
    return read_request(fields, spec=_spec(), accepted=Accepted.by(_host().settings))


def _video(job: Job) -> dict[str, Any]:
    percent = 100 * job.step // job.num_steps if job.num_steps else 0
    error = (
        {
            "code": "cancelled" if job.status is JobStatus.CANCELLED else "failed",
            "message": str(job.error),
        }
        if job.error
        else None
    )
    return {
        "id": job.id,
        "object": "video",
        "model": _host().model,
        "status": STATUS[job.status],
        "progress": percent,
        "created_at": int(job.created_s),
        "completed_at": int(job.ended_s) if job.ended_s else None,
        "error": error,
    }


def model_of(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "local"}


def _require_output(output: str) -> None:
    if _spec().output != output:
        other = "/v1/videos" if output == "image" else "/v1/images/generations"
        raise UnsupportedError(f"{_spec().title} makes {_spec().output}s. Use {other}.")


def _host() -> Any:
    return current_app.extensions["host"]


def _spec() -> Any:
    return _host().spec

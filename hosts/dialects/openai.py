"""OpenAI's images and videos API: its names, responses and error shape.

Requests may also have the fields of /v1/jobs: seed, negative_prompt, ...
"""

import base64
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from flask import Blueprint, Response, current_app, jsonify, request

from backends.errors import BusyError, NotFoundError, RequestError, UnsupportedError
from backends.request import GenerateRequest
from hosts.dialects import openai_fields as protocol
from hosts.dialects.openai_fields import Asked
from hosts.dialects.openai_stream import image_events
from hosts.http import media
from hosts.http.access import link_to
from hosts.http.decode import Accepted, decode_request, read_request
from hosts.http.dialect import (
    Dialect,
    Operation,
    choice,
    is_empty,
    is_strict,
    require_known,
    shown,
    truth,
    whole,
)
from hosts.http.jobs_api import event_stream, file_response, note_headers
from hosts.http.request_io import (
    find_job,
    json_object,
    own_jobs,
    seeds_from,
    submit,
    submit_all,
    wait_for_all,
)
from hosts.jobs.queue import Job, JobStatus
from hosts.supervision.host_state import Phase

blueprint = Blueprint("openai", __name__)

VARIANTS = {"video": "video/mp4", "thumbnail": "image/webp", "spritesheet": "image/jpeg"}
STATUS = {
    JobStatus.QUEUED: "queued",
    JobStatus.RUNNING: "in_progress",
    JobStatus.DONE: "completed",
    JobStatus.FAILED: "failed",
    JobStatus.CANCELLED: "failed",
}


def error_body(message: str, status: int, field: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": field, "code": None}}


DIALECT = Dialect(
    blueprint=blueprint,
    paths=("/v1/",),
    error_body=error_body,
    media_types=("application/json", "multipart/form-data"),
    operations=(
        Operation(
            method="post",
            path="/v1/images/generations",
            summary="OpenAI: text to image; with `stream` as server-sent events.",
            rules=protocol.IMAGES,
        ),
        Operation(
            method="post",
            path="/v1/images/edits",
            summary="OpenAI: image to image, as JSON or as a form.",
            rules=protocol.EDITS,
        ),
        Operation(
            method="post",
            path="/v1/images/variations",
            summary="OpenAI: variations of an image; the prompt may be left out.",
            rules=protocol.VARIATIONS,
        ),
        Operation(
            method="post",
            path="/v1/videos/{id}/remix",
            summary="OpenAI: the same video with another prompt.",
            rules=protocol.REMIX,
        ),
        Operation(
            method="post",
            path="/v1/videos",
            summary="OpenAI: queue a video.",
            rules=protocol.VIDEOS,
        ),
        Operation(method="get", path="/v1/videos", summary="OpenAI: all videos."),
        Operation(method="get", path="/v1/videos/{id}", summary="OpenAI: a video's state."),
        Operation(method="delete", path="/v1/videos/{id}", summary="OpenAI: delete a video."),
        Operation(
            method="get",
            path="/v1/videos/{id}/content",
            summary="OpenAI: the video.",
            media_type="video/mp4",
        ),
        Operation(method="get", path="/v1/models", summary="OpenAI: the names of the models."),
        Operation(method="get", path="/v1/models/{id}", summary="OpenAI: one of them."),
    ),
)


@blueprint.get("/v1/models")
def models() -> Response:
    """Return the models that requests may name, the default first; none while none is loaded on a
    host that gets its model over HTTP.
    """
    is_empty = _host().state.phase is Phase.EMPTY
    data = [] if is_empty else [model_of(name) for name in _host().models]
    return jsonify({"object": "list", "data": data})


@blueprint.get("/v1/models/<path:name>")
def model(name: str) -> Response:
    if name not in _host().models:
        raise NotFoundError(f"there is no model {name!r}. Allowed: {', '.join(_host().models)}.")
    return jsonify(model_of(name))


@blueprint.post("/v1/images/generations")
def generations() -> Response:
    """Generate images from text."""
    _require_output("image")
    body = dict(json_object())
    require_known(body, protocol.IMAGES, protocol.HINTS)
    return _images(body, protocol.asked_for(body), kind="image_generation")


@blueprint.post("/v1/images/edits")
def edits() -> Response:
    """Edit an image. `strength` sets how much may change.

    With a mask, only its transparent parts change.
    """
    _require_output("image")
    body = protocol.body_of_request()
    require_known(body, protocol.EDITS, protocol.HINTS)
    asked = protocol.edited(body, protocol.asked_for(body), _accepted(), spec=_spec())
    return _images(body, asked, kind="image_edit")


@blueprint.post("/v1/images/variations")
def variations() -> Response:
    """Vary an image. `strength` sets how much may change; a prompt may be given."""
    _require_output("image")
    body = protocol.body_of_request()
    require_known(body, protocol.VARIATIONS, protocol.HINTS)
    asked = protocol.varied(body, protocol.asked_for(body), _accepted(), spec=_spec())
    return _images(body, asked, kind="image_variation")


@blueprint.get("/v1/videos")
def videos() -> Response:
    """Return all videos, newest first. after=ID and limit=N work as in OpenAI's API."""
    _require_output("video")
    jobs = [job for job in own_jobs() if job.is_kept and _host().is_of(job)]
    is_newest_first = choice(request.args, "order", {"asc": False, "desc": True}, True)
    jobs.sort(key=lambda job: job.created_s, reverse=is_newest_first)
    ids = [job.id for job in jobs]
    if after := request.args.get("after"):
        if after not in ids:
            raise RequestError(
                f"after={shown(after)} is not a video here. Send the id of one of the list, or "
                "leave it out.",
                field="after",
            )
        jobs = jobs[ids.index(after) + 1 :]
    limit = whole(request.args, "limit", len(jobs), low=1, high=1000)
    return jsonify(
        {
            "object": "list",
            "data": [_video(job) for job in jobs[:limit]],
            "has_more": limit < len(jobs),
        }
    )


@blueprint.post("/v1/videos")
def create_video() -> Response:
    """Create a video job.

    GET /v1/videos/<id> returns its state, GET /v1/videos/<id>/content the file.
    """
    _require_output("video")
    body = protocol.body_of_request()
    require_known(body, protocol.VIDEOS, protocol.HINTS)
    asked = protocol.filmed(body, protocol.asked_for(body), spec=_spec())
    job = submit(_read(asked, body), is_kept=True, is_stored=True)
    return jsonify(_video(job))


@blueprint.get("/v1/videos/<job_id>")
def show_video(job_id: str) -> Response:
    return jsonify(_video(find_job(job_id)))


@blueprint.get("/v1/videos/<job_id>/content")
def video_content(job_id: str) -> Response:
    """Return the video as MP4, its first frame as WebP, or all frames side by side as JPEG."""
    variant = request.args.get("variant", "video").strip().lower()
    if variant not in VARIANTS:
        raise UnsupportedError(
            f"variant={variant[:80]!r} is not available. Allowed: {', '.join(VARIANTS)}.",
            field="variant",
        )
    job = find_job(job_id)
    if not job.finished.is_set():
        raise RequestError(
            f"video {job_id!r} is not done. Ask GET /v1/videos/{job_id} until its status is "
            "completed."
        )
    if variant == "video":
        return file_response(job, "video/mp4")
    frames = job.wait().frames
    image = frames[:1] if variant == "thumbnail" else _sheet(frames)
    data = media.encode(replace(job.wait(), frames=image), VARIANTS[variant])
    return Response(data, mimetype=VARIANTS[variant])


def _sheet(frames: np.ndarray) -> np.ndarray:
    """Return frames (N, H, W, 3) as one image (1, rows * H, columns * W, 3)."""
    columns = math.ceil(math.sqrt(len(frames)))
    rows = math.ceil(len(frames) / columns)
    blank = np.zeros((rows * columns - len(frames), *frames.shape[1:]), frames.dtype)
    _, height, width, channels = frames.shape
    grid = np.concatenate([frames, blank]).reshape(rows, columns, height, width, channels)
    return grid.transpose(0, 2, 1, 3, 4).reshape(1, rows * height, columns * width, channels)


@blueprint.post("/v1/videos/<job_id>/remix")
def remix_video(job_id: str) -> Response:
    """Create a video like another one, with another prompt."""
    body = protocol.body_of_request()
    require_known(body, protocol.REMIX)
    first = find_job(job_id)
    if "prompt" not in _spec().requires:
        raise UnsupportedError(f"remix is not available: {_spec().title} reads no prompt.")
    if is_empty(body.get("prompt")):
        raise RequestError("prompt is missing. Send the new one.", field="prompt")
    new = decode_request({"prompt": body["prompt"]}, spec=_spec(), accepted=_accepted())
    changed = first.request.model_copy(update={"prompt": new.prompt})
    job = submit(changed, is_kept=True, is_stored=True)
    return jsonify({**_video(job), "remixed_from_video_id": job_id})


@blueprint.delete("/v1/videos/<job_id>")
def delete_video(job_id: str) -> Response:
    """Cancel the job and forget it."""
    _host().queue.forget(find_job(job_id))
    return jsonify({"id": job_id, "object": "video.deleted", "deleted": True})


def _images(body: Mapping[str, Any], asked: Asked, *, kind: str) -> Response:
    most = min(protocol.MAX_IMAGES, _host().settings.max_images)
    number = whole(body, "n", 1, low=1, high=most)
    urls = {"url": "url", "b64_json": "b64_json"}
    form = choice(body, "response_format", urls, "")
    num_partial = whole(body, "partial_images", 0, low=0, high=protocol.MAX_PARTIAL)
    is_streamed = truth(body, "stream", False)
    if num_partial and not is_streamed and is_strict(body):
        raise RequestError(
            f"partial_images={num_partial} has no effect without stream. Send stream true, or "
            "leave it out.",
            field="partial_images",
        )
    content_type, compression = _encoding(body)
    encode = partial(media.encode, content_type=content_type, quality=compression)
    seeds = seeds_from(asked.fields.get("seed"), number)
    requests = [_read(asked, body, seed=seed) for seed in seeds]
    is_link = form != "b64_json" and not is_streamed
    jobs = submit_all(requests, is_kept=True, is_stored=is_link)
    if is_streamed:
        events = image_events(
            jobs,
            encode,
            kind=kind,
            output_format=content_type.partition("/")[2],
            num_partial=num_partial,
            error_body=error_body,
        )
        return _streamed(events, jobs)
    results = wait_for_all(jobs)
    query = {"format": media.EXTENSIONS[content_type], "quality": str(compression)}
    contents = []
    for job, result in zip(jobs, results, strict=True):
        for number, image in enumerate(media.each_image(result, "image")):
            made: dict[str, Any] = {"seed": job.request.seed}
            if is_link:
                path = f"/v1/jobs/{job.id}/result"
                made["url"] = link_to(path, **query, **_numbered(number))
            if form != "url":  # programs for GPT Image send no format and read only b64_json
                made["b64_json"] = base64.b64encode(encode(image)).decode("ascii")
            contents.append(made)
    answer = jsonify({"created": int(time.time()), "data": contents})
    answer.headers.update(note_headers(results[0].report))
    return answer


def _numbered(number: int) -> dict[str, str]:
    """Return what a link needs to another image than the first."""
    return {"image": str(number)} if number else {}


def _streamed(events: Iterator[str], jobs: Sequence[Job]) -> Response:
    try:
        return event_stream(events)
    except BusyError:
        for job in jobs:
            _host().queue.cancel(job)
        raise


def _encoding(body: Mapping[str, Any]) -> tuple[str, int]:
    """Return content type and quality of the files: output_format and output_compression."""
    content_type = choice(body, "output_format", media.FORMATS, "image/png")
    quality = whole(body, "output_compression", 100, low=0, high=100)
    if content_type == "image/png" and quality != 100:
        raise RequestError(
            f"output_compression={quality} is not for PNG, which loses nothing. Send "
            "output_format jpeg or webp, or leave it out.",
            field="output_compression",
        )
    is_given = not is_empty(body.get("output_compression"))
    return content_type, quality if is_given else media.QUALITY


def _read(asked: Asked, body: Mapping[str, Any], **others: Any) -> GenerateRequest:
    return read_request(
        {**asked.fields, **others},
        spec=_spec(),
        accepted=_accepted(),
        sent_as=asked.sent_as,
        is_strict=is_strict(body),
    )


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
    spec = _spec()
    frames = job.request.num_frames or spec.num_frames or 1
    size = f"{job.request.width or spec.width}x{job.request.height or spec.height}"
    return {
        "id": job.id,
        "object": "video",
        "model": _host().model,
        "status": STATUS[job.status],
        "progress": percent,
        "created_at": int(job.created_s),
        "completed_at": int(job.ended_s) if job.ended_s else None,
        "expires_at": None,
        "prompt": job.request.prompt,
        "seconds": f"{frames / (job.request.fps or spec.frames_per_s):g}",
        "size": size,
        "error": error,
    }


def model_of(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "local"}


def _require_output(output: str) -> None:
    if _spec().output != output:
        other = "/v1/videos" if output == "image" else "/v1/images/generations"
        raise UnsupportedError(f"{_spec().title} generates {_spec().output}s. Use {other}.")


def _accepted() -> Accepted:
    return _host().accepted


def _host() -> Any:
    return current_app.extensions["host"]


def _spec() -> Any:
    return _host().spec

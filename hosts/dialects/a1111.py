"""The API of the A1111 web interface (/sdapi/v1): txt2img, img2img and progress.

a1111_lists.py has lists and options, a1111_extras.py the upscalers, a1111_fields.py the treatment
of each field.
"""

import base64
import io
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flask import Blueprint, Response, current_app, jsonify
from PIL import Image

from backends.errors import CancelledError, UnsupportedError
from backends.request import GenerateRequest, GenerateResult
from hosts.dialects import a1111_control, a1111_extras, a1111_lists
from hosts.dialects import a1111_fields as protocol
from hosts.dialects.a1111_fields import Asked
from hosts.dialects.a1111_info import info, infotext
from hosts.dialects.a1111_passes import hires_of
from hosts.http import media
from hosts.http.decode import Accepted, decode_request, read_request
from hosts.http.dialect import (
    Dialect,
    Operation,
    is_empty,
    is_strict,
    require_known,
    truth,
)
from hosts.http.request_io import json_object, own_jobs, seeds_from, submit_all, wait_for_all
from hosts.jobs.job import now
from hosts.jobs.queue import Job, JobStatus

logger = logging.getLogger(__name__)
blueprint = Blueprint("a1111", __name__)

IMAGE_STRENGTH = 0.75
"""A1111's default for denoising_strength."""
START = {"init_image": "init_images", "image": "init_images", "mask_image": "mask"}
"""Fields of /v1/jobs that init_images becomes."""
HINTS = {"negative": "negative_prompt", "guidance_scale": "cfg_scale"}


def error_body(message: str, status: int, field: str | None = None) -> dict[str, Any]:
    return {"error": "HTTPException", "detail": message, "body": "", "errors": message}


OPERATIONS = (
    Operation(
        method="post",
        path="/sdapi/v1/txt2img",
        summary="A1111: text to image.",
        rules=protocol.TXT2IMG,
    ),
    Operation(
        method="post",
        path="/sdapi/v1/img2img",
        summary="A1111: image to image.",
        rules=protocol.IMG2IMG,
    ),
    Operation(method="get", path="/sdapi/v1/progress", summary="A1111: of the job that runs."),
    Operation(method="post", path="/sdapi/v1/interrupt", summary="A1111: end it with an image."),
    Operation(method="post", path="/sdapi/v1/skip", summary="A1111: the same for one of several."),
)
DIALECT = Dialect(
    blueprint=blueprint,
    paths=("/sdapi/",),
    error_body=error_body,
    is_body_optional=True,
    operations=OPERATIONS,
)
DIALECTS = (
    DIALECT,
    replace(DIALECT, blueprint=a1111_lists.blueprint, operations=a1111_lists.OPERATIONS),
    replace(DIALECT, blueprint=a1111_extras.blueprint, operations=a1111_extras.OPERATIONS),
    replace(
        DIALECT,
        blueprint=a1111_control.blueprint,
        paths=("/controlnet/",),
        operations=a1111_control.OPERATIONS,
    ),
)


@blueprint.post("/sdapi/v1/txt2img")
def txt2img() -> Response:
    """Generate images from text; with enable_hr each a second time, from the first result."""
    body = json_object()
    require_known(body, protocol.TXT2IMG, HINTS)
    asked = _asked(body)
    first = {name: value for name, value in asked.fields.items() if name != "strength"}
    requests = _requests(body, asked, first)
    if not truth(body, "enable_hr", False):
        return _answer(body, asked, _results(requests))
    hires = hires_of(body, size=_size(requests[0]), spec=_host().spec, accepted=_accepted())
    second = replace(asked, sent_as={**asked.sent_as, **hires.sent_as}, facts=hires.facts, number=1)
    size = {"width": hires.width, "height": hires.height}
    any_start = {"init_image": Image.new("RGB", (8, 8))}  # refused before the first pass
    _requests(body, second, {**first, **size, **any_start, **hires.fields})
    results = _results(_requests(body, asked, {**first, **hires.first}))
    if any("ended_early" in result.report for result in results):
        return _answer(body, asked, results)
    requests = [
        request
        for result in results
        for request in _requests(body, second, {**first, **hires.start(result)})
    ]
    return _answer(body, second, _results(requests))


@blueprint.post("/sdapi/v1/img2img")
def img2img() -> Response:
    """Generate images from an image. With a mask, only its white parts change.

    With inpaint_full_res the part around them is generated at the request's size and put back.
    """
    body = dict(json_object())
    if is_empty(body.get("denoising_strength")):
        body["denoising_strength"] = IMAGE_STRENGTH
    require_known(body, protocol.IMG2IMG, HINTS)
    asked = _asked(body)
    fields = dict(asked.fields)
    strength = fields.pop("strength", None)
    sized = _requests(body, replace(asked, number=1), fields, read=decode_request)
    size = _size(sized[0])
    start, area = protocol.start_fields(body, spec=_host().spec, accepted=_accepted(), size=size)
    if "init_image" in start:  # a model that edits an image has no strength, but clients send one
        fields["strength"] = strength
    asked = replace(asked, sent_as={**asked.sent_as, **START})
    results = _results(_requests(body, asked, {**fields, **start}))
    return _answer(body, asked, [area.put_back(each) for each in results] if area else results)


@blueprint.get("/sdapi/v1/progress")
def progress() -> Response:
    """Return the progress of the sender's running job.

    `current_image` is its preview, from the second call on.
    """
    job = next((job for job in own_jobs() if job.status is JobStatus.RUNNING), None)
    share = job.step / job.num_steps if job and job.num_steps else 0.0
    if job is not None:
        job.wants_preview = True
    return jsonify(
        {
            "progress": share,
            "eta_relative": _seconds_left(job, share),
            "state": _state(job),
            "current_image": _png(job.preview) if job and job.preview is not None else None,
            "textinfo": None,
        }
    )


@blueprint.post("/sdapi/v1/<any('interrupt', 'skip'):name>")
def interrupt(name: str) -> Response:
    """End the sender's running jobs at their next step, with images of what there is. To interrupt
    also cancels the other images of their requests.
    """
    for job in own_jobs():
        _host().queue.end_early(job, with_series=name == "interrupt")
    return jsonify({})


def _results(requests: Sequence[GenerateRequest]) -> list[GenerateResult]:
    """Return an image of each request, or of those that had begun when they were interrupted."""
    jobs = submit_all(requests)
    try:
        return wait_for_all(jobs)
    except CancelledError:
        results = [job.result for job in jobs if job.result is not None]
        if not results or not any(job.ends_early for job in jobs):
            raise
        return results


def _asked(body: Mapping[str, Any]) -> Asked:
    host = _host()
    if host.spec.output != "image":
        raise UnsupportedError(f"{host.spec.title} generates videos. Use POST /v1/jobs.")
    asked = protocol.asked_for(
        body,
        spec=host.spec,
        accepted=_accepted(),
        title=host.model,
        most=host.settings.max_images,
    )
    for note in asked.notes:
        logger.warning("%s", note)
    return asked


def _requests(
    body: Mapping[str, Any],
    asked: Asked,
    fields: Mapping[str, Any],
    *,
    read: Callable[..., GenerateRequest] = read_request,
) -> list[GenerateRequest]:
    """Return one request for each image. read: decode_request while inputs are still missing."""
    return [
        read(
            {**fields, "seed": seed},
            spec=_host().spec,
            accepted=_accepted(),
            sent_as=asked.sent_as,
            is_strict=is_strict(body),
        )
        for seed in seeds_from(fields.get("seed"), asked.number)
    ]


def _size(request: GenerateRequest) -> tuple[int, int]:
    """Return width and height of the image that will be generated."""
    host = _host()
    return (
        request.width or host.settings.width or host.spec.width,
        request.height or host.settings.height or host.spec.height,
    )


def _answer(body: Mapping[str, Any], asked: Asked, results: list[GenerateResult]) -> Response:
    model = _host().model
    results = [image for result in results for image in media.each_image(result, "image")]
    images = [_file(body, asked, result) for result in results]
    has_start = truth(body, "include_init_images", False)
    parameters = {name: value for name, value in body.items() if name not in protocol.NOTES}
    parameters |= {} if has_start else {"init_images": None, "mask": None}
    return jsonify(
        {
            "images": images if truth(body, "send_images", True) else [],
            "parameters": parameters,
            "info": json.dumps(info(body, asked, results, model=model)),
        }
    )


def _file(body: Mapping[str, Any], asked: Asked, result: GenerateResult) -> str:
    text = infotext(body, asked, result, model=_host().model)
    data = media.encode(result, asked.content_type, metadata=text)
    return base64.b64encode(data).decode("ascii")


def _state(job: Job | None) -> dict[str, Any]:
    step, steps = (job.step, job.num_steps) if job else (0, 0)
    began = job.created_s if job else None
    return {
        "skipped": False,
        "interrupted": bool(job and (job.ends_early or job.cancel_requested)),
        "job": job.id if job else "",
        "stopping_generation": False,
        "job_count": int(job is not None),
        "job_timestamp": time.strftime("%Y%m%d%H%M%S", time.localtime(began)) if began else "0",
        "job_no": 0,
        "sampling_step": step,
        "sampling_steps": steps,
    }


def _seconds_left(job: Job | None, share: float) -> float:
    if job is None or not share:
        return 0.0
    return (now() - (job.started_s or now())) * (1 - share) / share


def _png(preview: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(preview).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _accepted() -> Accepted:
    return _host().accepted


def _host() -> Any:
    return current_app.extensions["host"]

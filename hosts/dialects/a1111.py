"""The API of the A1111 web interface (/sdapi/v1), as far as a host with one loaded model has it."""

import base64
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flask import Blueprint, Response, current_app, jsonify
from PIL import Image, ImageOps

from backends.errors import RequestError, UnsupportedError
from backends.generation.schedulers import SCHEDULERS
from hosts.http import media
from hosts.http.decode import Accepted, read_image, read_request
from hosts.http.dialect import Dialect
from hosts.http.request_io import json_object, seeds_from, submit_all, wait_for_all
from hosts.jobs.clock import now
from hosts.jobs.queue import Job, JobStatus

blueprint = Blueprint("a1111", __name__)

SENT_AS = {
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "denoising_strength": "strength",
}
PLAIN = ("prompt", "negative_prompt", "seed", "width", "height", "lora")
UNSUPPORTED = ("enable_hr", "script_name", "refiner_checkpoint", "tiling", "restore_faces")
KARRAS = re.compile(r"[ _]karras$", re.IGNORECASE)


def error_body(message: str, status: int) -> dict[str, Any]:
    return {"error": "HTTPException", "detail": message, "body": "", "errors": message}


DIALECT = Dialect(
    blueprint=blueprint, paths=("/sdapi/",), error_body=error_body, is_body_optional=True
)


@blueprint.post("/sdapi/v1/txt2img")
def txt2img() -> Response:
    return _images(json_object(), {})


@blueprint.post("/sdapi/v1/img2img")
def img2img() -> Response:
    """With a mask, its white parts change; the whole image is drawn at once, whatever
    inpaint_full_res says.
    """
    body = json_object()
    sources = body.get("init_images")
    if not isinstance(sources, list) or len(sources) != 1:
        raise RequestError(
            "init_images must hold one image, base64 of a PNG, JPEG or WebP file.",
            field="init_images",
        )
    spec = current_app.extensions["host"].spec
    name = "image" if "image" in spec.requires else "init_image"
    mask = (
        {"mask_image": _mask(body["mask"], is_inverted=bool(body.get("inpainting_mask_invert")))}
        if body.get("mask")
        else {}
    )
    return _images({"denoising_strength": 0.75, **body}, {name: sources[0], **mask})


@blueprint.get("/sdapi/v1/progress")
def progress() -> Response:
    """Of the job that runs; `current_image` is its preview, from the second call on."""
    queue = current_app.extensions["host"].queue
    job = next((job for job in queue.jobs() if job.status is JobStatus.RUNNING), None)
    if job is None:
        return jsonify(
            {
                "progress": 0.0,
                "eta_relative": 0.0,
                "state": _state(None),
                "current_image": None,
                "textinfo": None,
            }
        )
    job.wants_preview = True
    share = job.step / job.num_steps if job.num_steps else 0.0
    left = (1 - share) / share if share else 0.0
    seconds = (now() - (job.started_s or now())) * left
    return jsonify(
        {
            "progress": share,
            "eta_relative": seconds,
            "state": _state(job),
            "current_image": _png(job.preview) if job.preview is not None else None,
            "textinfo": None,
        }
    )


@blueprint.post("/sdapi/v1/interrupt")
def interrupt() -> Response:
    """Cancel the job that runs."""
    queue = current_app.extensions["host"].queue
    for job in queue.jobs():
        if job.status is JobStatus.RUNNING:
            queue.cancel(job, "the job was interrupted.")
    return jsonify({})


@blueprint.get("/sdapi/v1/options")
def options() -> Response:
    return jsonify({"sd_model_checkpoint": _title(), "samples_format": "png"})


@blueprint.post("/sdapi/v1/options")
def set_options() -> Response:
    """Only what is so already can be set: the model is fixed at start."""
    body = json_object()
    wrong = {
        name: value
        for name, value in body.items()
        if name == "sd_model_checkpoint" and value != _title()
    }
    if wrong:
        raise UnsupportedError(
            f"sd_model_checkpoint={wrong['sd_model_checkpoint']!r} is not loaded. Allowed: "
            f"{_title()!r}; start another host."
        )
    return jsonify({})


@blueprint.get("/sdapi/v1/sd-models")
def sd_models() -> Response:
    name = _title()
    return jsonify(
        [
            {
                "title": name,
                "model_name": name,
                "hash": None,
                "sha256": None,
                "filename": name,
                "config": None,
            }
        ]
    )


@blueprint.get("/sdapi/v1/samplers")
def samplers() -> Response:
    flow = current_app.extensions["host"].spec.flow_matching
    return jsonify(
        [
            {"name": name, "aliases": [name], "options": {}}
            for name, facts in SCHEDULERS.items()
            if facts.flow == flow
        ]
    )


@blueprint.get("/sdapi/v1/loras")
def loras() -> Response:
    """The files that requests may name in `lora`."""
    folders = _accepted().lora_dirs
    files = sorted(path for folder in folders for path in Path(folder).glob("*.safetensors"))
    return jsonify(
        [
            {"name": path.name, "alias": path.stem, "path": path.name, "metadata": {}}
            for path in files
        ]
    )


def _images(body: Mapping[str, Any], sources: Mapping[str, str]) -> Response:
    host = current_app.extensions["host"]
    if host.spec.output != "image":
        raise UnsupportedError(f"{host.spec.title} makes videos. Use POST /v1/jobs.")
    if given := [name for name in UNSUPPORTED if body.get(name)]:
        raise UnsupportedError(f"{given[0]} is not available on this host. Leave it out.")
    number = _count(body, "n_iter") * _count(body, "batch_size")
    if number > host.settings.max_images:
        raise RequestError(
            f"n_iter x batch_size is {number}. Allowed: up to {host.settings.max_images}.",
            field="n_iter",
        )
    fields = {name: body[name] for name in PLAIN if body.get(name) is not None} | sources
    fields |= {
        ours: body[theirs] for theirs, ours in SENT_AS.items() if body.get(theirs) is not None
    }
    if not sources:
        fields.pop("strength", None)
    if sampler := body.get("sampler_name") or body.get("sampler_index"):
        fields["scheduler"] = _sampler(str(sampler), str(body.get("scheduler") or ""))
    requests = [
        read_request({**fields, "seed": seed}, spec=host.spec, accepted=_accepted())
        for seed in seeds_from(fields.get("seed"), number)
    ]
    results = wait_for_all(submit_all(requests))
    seeds = [result.seed for result in results]
    info = {
        "prompt": body.get("prompt", ""),
        "seed": seeds[0],
        "all_seeds": seeds,
        "sd_model_name": _title(),
        **results[0].resolved,
    }
    images = [
        base64.b64encode(
            media.encode(result, "image/png", metadata=json.dumps(result.resolved))
        ).decode("ascii")
        for result in results
    ]
    return jsonify(
        {"images": images, "parameters": {**body, "init_images": None}, "info": json.dumps(info)}
    )


def _mask(data: Any, *, is_inverted: bool) -> Any:
    """base64 of an image, black and white exchanged where that was asked for. RequestError if it is
    none.
    """
    if not is_inverted:
        return data
    buffer = io.BytesIO()
    ImageOps.invert(read_image(data, field="mask", accepted=_accepted()).convert("L")).save(
        buffer, format="PNG"
    )
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _count(body: Mapping[str, Any], name: str) -> int:
    value = body.get(name) or 1
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError(
            f"{name}={value!r} is not allowed. Send a whole number from 1.", field=name
        )
    return value


def _sampler(name: str, schedule: str) -> dict[str, Any]:
    """'DPM++ 2M Karras' -> {"scheduler": "dpmpp_2m", "use_karras_sigmas": true}."""
    plain = KARRAS.sub("", name).lower().replace("++", "pp").replace(" ", "_")
    is_karras = KARRAS.search(name) is not None or schedule.lower() == "karras"
    return {"scheduler": plain, **({"use_karras_sigmas": True} if is_karras else {})}


def _state(job: Job | None) -> dict[str, Any]:
    step, steps = (job.step, job.num_steps) if job else (0, 0)
    return {
        "skipped": False,
        "interrupted": bool(job and job.cancel_requested),
        "job": job.id if job else "",
        "job_count": int(job is not None),
        "job_no": 0,
        "sampling_step": step,
        "sampling_steps": steps,
    }


def _accepted() -> Accepted:
    return Accepted.by(current_app.extensions["host"].settings)


def _title() -> str:
    return current_app.extensions["host"].model


def _png(preview: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(preview).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")

"""Jobs over HTTP: submit, follow, fetch and cancel. Fields have diffusers' names."""

import base64
import difflib
import io
import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from flask import Blueprint, Response, current_app, jsonify, request
from PIL import Image
from pydantic import BaseModel, Field

from backends.errors import BusyError, NotFoundError, RequestError
from backends.plan import Exactness
from backends.request import MAX_FPS, GenerateRequest
from hosts.http import media
from hosts.http.decode import read_request
from hosts.http.dialect import (
    DONE,
    Dialect,
    choice,
    is_strict,
    require_known,
    shown,
    truth,
    whole,
)
from hosts.http.identity.sender import client
from hosts.http.request_io import (
    find_job,
    idempotency_key,
    json_object,
    own_jobs,
    submit,
    wanted_type,
)
from hosts.jobs.job import now
from hosts.jobs.queue import Job, JobQueue, JobStatus
from hosts.jobs.trace import chrome_trace

blueprint = Blueprint("jobs", __name__)
DIALECT = Dialect(blueprint=blueprint, paths=("/v1/jobs",), keeps_jobs=True)

RULES = dict.fromkeys(GenerateRequest.model_fields, DONE)
"""The fields of POST /v1/jobs."""
OLD_NAMES = {
    "positive": "prompt",
    "negative": "negative_prompt",
    "steps": "num_inference_steps",
    "cfg": "guidance_scale",
    "denoise": "strength",
    "frames": "num_frames",
    "latent": "latents",
    "ip_image": "ip_adapter_image",
    "sampler": "scheduler",
}
"""Names of other APIs -> our field, for messages."""
PARAMETERS = {
    "result": ("format", "fps", "quality", "image"),
    "events": ("previews",),
}
"""Route -> what may stand in its query."""
IN_ANY_QUERY = ("model", "signature", "expires", "key", "_")
"""The host's model, the parts of a signed link, and what clients add against caches."""
HEARTBEAT_S = 10.0
MIN_INTERVAL_S = 0.1
MAX_STREAMS = 24
"""Largest number of open streams: each holds one of the server's threads."""
STREAMS_OF_CLIENT = 12
"""Largest number of them for one client."""
PREVIEW_SIDE = 256
PREVIEW_QUALITY = 80

_streams: Counter[str] = Counter()
"""Client -> its open streams."""
_streams_lock = threading.Lock()


@blueprint.before_request
def require_known_query() -> None:
    """Refuse parameters of the query that the route does not read, or that are given twice."""
    taken = PARAMETERS.get(str(request.endpoint).rpartition(".")[2], ())
    for name, values in request.args.lists():
        if name not in (*taken, *IN_ANY_QUERY):
            nearest = difflib.get_close_matches(name[:80].lower(), taken, n=1, cutoff=0.0)
            advice = f"The nearest one is {nearest[0]}" if nearest else "It takes none"
            raise RequestError(
                f"{shown(name)} is not a parameter of {request.path}. {advice}. Correct or leave "
                f"out {shown(name)}.",
                field=name,
            )
        if len(values) > 1:
            raise RequestError(f"{name} is given {len(values)} times. Give it once.", field=name)


@blueprint.post("/v1/jobs")
def create() -> tuple[Response, int, dict[str, str]]:
    """Create a job. Return 202 with its id and its position in the queue.

    The same Idempotency-Key and body return the existing job.
    """
    host, body = current_app.extensions["host"], json_object()
    require_known(body, RULES, OLD_NAMES)
    require_model(body)
    asked = read_request(
        body,
        spec=host.spec,
        accepted=host.accepted,
        is_strict=is_strict(body),
    )
    job = submit(asked, is_stored=True, key=idempotency_key())
    location = f"{request.script_root}/v1/jobs/{job.id}"
    return jsonify(describe(job)), 202, {"Location": location}


@blueprint.get("/v1/jobs")
def everything() -> Response:
    """Return the jobs of this client's key, or all where there are no --api_keys: running, waiting
    and finished. Without prompts, as other clients' jobs may be among them.
    """
    return jsonify({"jobs": without_settings(own_jobs())})


@blueprint.get("/v1/jobs/<job_id>")
def show(job_id: str) -> Response:
    """Return a job's state and progress, and the settings that were used once it is over."""
    return jsonify(describe(find_job(job_id)))


@blueprint.delete("/v1/jobs/<job_id>")
def cancel(job_id: str) -> tuple[Response, int]:
    """Cancel a job: at once if it waits, at the next step on all ranks if it runs."""
    job = find_job(job_id)
    _queue().cancel(job)
    return jsonify(describe(job)), 202


@blueprint.get("/v1/jobs/<job_id>/result")
def result(job_id: str) -> Response | tuple[Response, int, dict[str, str]]:
    """Return the file, or JSON with it, as Accept says, or the file of ?format=.

    ?fps= sets the speed of a video, ?quality= that of JPEG and WebP, and ?image= takes another
    image than the first, 0, where X-Images says that there are several. 409 while the job is not
    done. A failed job returns its own error.
    """
    host = current_app.extensions["host"]
    job = find_job(job_id)
    if not job.finished.is_set():
        return jsonify(describe(job)), 409, {"Retry-After": "1"}
    made = job.wait()
    content_type = _format() or wanted_type(
        host.spec.output, default=media.content_types(host.spec.output)[0]
    )
    if content_type == "application/json":
        return jsonify(media.as_json(made, host.spec.output, frames_per_s=_frames_per_s()))
    quality = whole(request.args, "quality", media.QUALITY, low=0, high=100)
    last = len(media.each_image(made, host.spec.output)) - 1
    number = whole(request.args, "image", 0, low=0, high=last)
    return file_response(
        job, content_type, frames_per_s=_frames_per_s(), quality=quality, number=number
    )


@blueprint.get("/v1/jobs/<job_id>/events")
def events(job_id: str) -> Response:
    """Stream server-sent events until the job is over.

    `status` at each change, and with ?previews=1 `preview`, a small JPEG.
    """
    job = find_job(job_id)
    with_previews = truth(request.args, "previews", False)
    job.wants_preview = job.wants_preview or with_previews
    return event_stream(_follow(_queue(), job, with_previews))


@blueprint.get("/v1/jobs/<job_id>/trace")
def trace(job_id: str) -> Response | tuple[Response, int, dict[str, str]]:
    """Return the activity of every rank over time as a Chrome trace. 409 while the job is not
    over.
    """
    job = find_job(job_id)
    if not job.finished.is_set():
        return jsonify(describe(job)), 409, {"Retry-After": "1"}
    return jsonify(chrome_trace(job))


def require_model(body: Mapping[str, Any]) -> None:
    """Raise NotFoundError if the request names a model that is not loaded."""
    host = current_app.extensions["host"]
    if is_strict(body) and body.get("model") not in (None, "", host.model):
        raise NotFoundError(
            f"there is no model {shown(body['model'])}. Allowed: {', '.join(host.models)}."
        )


def event_stream(events: Iterator[str]) -> Response:
    """Return a response that streams server-sent events. BusyError if too many streams are open."""
    reader = client()
    with _streams_lock:
        if _streams.total() >= MAX_STREAMS or _streams[reader] >= STREAMS_OF_CLIENT:
            raise BusyError(
                f"{_streams[reader]} event streams of this client are open, and "
                f"{_streams.total()} in all. This host allows {STREAMS_OF_CLIENT}, and "
                f"{MAX_STREAMS} in all. Ask GET /v1/jobs/<id> for a job's state instead."
            )
        _streams[reader] += 1
    answer = Response(events, mimetype="text/event-stream", headers={"Cache-Control": "no-store"})
    answer.call_on_close(lambda: _end_stream(reader))
    return answer


def _end_stream(reader: str) -> None:
    with _streams_lock:
        _streams[reader] -= 1
        if not _streams[reader]:
            del _streams[reader]


def file_response(
    job: Job,
    content_type: str,
    *,
    frames_per_s: float | None = None,
    quality: int = media.QUALITY,
    number: int = 0,
) -> Response:
    """Return a finished job's video, or the image of this number. A PNG has its settings as
    metadata.
    """
    made = job.wait()
    several = media.each_image(made, current_app.extensions["host"].spec.output)
    if content_type in media.IMAGE_TYPES:
        made = several[number]
    with current_app.extensions["metrics"].serialising():
        data = media.encode(
            made,
            content_type,
            metadata=json.dumps(made.resolved),
            frames_per_s=frames_per_s,
            quality=quality,
        )
    extension = media.EXTENSIONS[content_type]
    headers = {
        "X-Seed": str(made.seed),
        "X-Images": str(len(several)),
        "Content-Disposition": f'inline; filename="{job.id}.{extension}"',
        **note_headers(made.report),
    }
    return Response(data, mimetype=content_type, headers=headers)


def without_settings(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Return the facts about jobs that any client may see."""
    return [
        {key: value for key, value in describe(job).items() if key != "settings"} for job in jobs
    ]


class JobView(BaseModel):
    """Facts about a job for clients: the response of GET /v1/jobs/<id>, and its schema."""

    id: str
    state: JobStatus
    position: Annotated[int, Field(description="Jobs before it in the queue.")]
    step: int
    steps: int
    seconds: Annotated[float | None, Field(description="How long it has run.")]
    eta: Annotated[float | None, Field(description="Seconds that it still needs.")]
    attempts: Annotated[int, Field(description="How often it was begun.")]
    created: Annotated[float, Field(description="Seconds since 1970.")]
    seed: int
    model: Annotated[str, Field(description="Its name.")]
    type: str
    backend: str | None
    method: Annotated[str | None, Field(description="How it was made, once it is done.")]
    ranks: Annotated[int | None, Field(description="How many work on it.")]
    batch: Annotated[
        int | None, Field(description="Jobs that were made in one batch, this one included.")
    ]
    exactness: Exactness | None
    settings: Annotated[
        dict[str, Any] | None,
        Field(description="The request with every default filled in, once it is done."),
    ]
    notes: Annotated[list[str], Field(description="What was not done as asked, once it is done.")]
    error: str | None
    links: dict[str, str]


def describe(job: Job) -> dict[str, Any]:
    """Return the facts about a job for clients, as JSON."""
    host = current_app.extensions["host"]
    seconds = None if job.started_s is None else (job.ended_s or now()) - job.started_s
    is_running = job.status is JobStatus.RUNNING and job.step > 0
    facts, result = host.facts_for(job), job.result
    report = result.report if result is not None else {}
    view = JobView(
        id=job.id,
        state=job.status,
        position=host.queue.position(job),
        step=job.step,
        steps=job.num_steps,
        seconds=None if seconds is None else round(seconds, 3),
        eta=round(seconds / job.step * (job.num_steps - job.step), 3) if is_running else None,
        attempts=job.attempts,
        created=round(job.created_s, 3),
        seed=job.request.seed,
        model=job.request.model or host.model,
        type=host.type_of(job),
        backend=report.get("backend") or facts.get("backend"),
        method=report.get("method"),
        ranks=(report.get("ranks") if result is not None else job.ranks) or facts.get("ranks"),
        batch=report.get("batch"),
        exactness=result.exactness if result is not None else facts.get("exactness"),
        settings=result.resolved if result is not None else None,
        notes=notes_of(report),
        error=str(job.error) if job.error is not None else None,
        links=_links(job.id),
    )
    return view.model_dump()


def notes_of(report: Mapping[str, Any]) -> list[str]:
    """Return what a client must know of a result's report: what was not done as asked."""
    notes = []
    if unread := report.get("unread_tokens"):
        notes.append(
            f"the last {unread} tokens of the prompt were not read: the model takes no more."
        )
    if sizes := report.get("sizes"):
        asked, made = (f"{width} x {height}" for height, width in sizes)
        notes.append(f"the model made {made} instead of {asked}: it scales to sizes of its own.")
    return notes


def note_headers(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the notes as headers of a file; none if there are none."""
    notes = notes_of(report)
    return {"X-Notes": " ".join(notes)} if notes else {}


def _links(job_id: str) -> dict[str, str]:
    paths = {"self": "", "events": "/events", "result": "/result"}
    return {name: f"/v1/jobs/{job_id}{path}" for name, path in paths.items()}


def _format() -> str | None:
    """Return the content type of ?format=, a file's ending."""
    found = {end: kind for kind, end in media.EXTENSIONS.items()} | media.FORMATS
    return choice(request.args, "format", found, None)


def _frames_per_s() -> float | None:
    """Return ?fps=, or None for the speed that the video was generated for."""
    return whole(request.args, "fps", 0, low=1, high=MAX_FPS) or None


def _queue() -> JobQueue:
    return current_app.extensions["host"].queue


def _follow(queue: JobQueue, job: Job, with_previews: bool) -> Iterator[str]:
    app = current_app._get_current_object()
    seen, shown = -1, None

    def stream() -> Iterator[str]:
        nonlocal seen, shown
        while True:
            version = queue.wait_for_change(job, seen, HEARTBEAT_S)
            if version == seen:
                yield ": still waiting\n\n"
                continue
            seen, preview, step = version, job.preview, job.step
            is_over = job.finished.is_set()
            with app.app_context():
                status = event("status", describe(job))
            yield status
            if with_previews and preview is not None and preview is not shown:
                shown = preview
                yield event("preview", {"step": step, "image": _data_url(preview)})
            if is_over:
                return
            job.finished.wait(MIN_INTERVAL_S)  # returns at once when the job ends

    return stream()


def event(name: str, data: dict[str, Any]) -> str:
    """Return one server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _data_url(preview: Any) -> str:
    image = Image.fromarray(preview)
    scale = max(1, PREVIEW_SIDE // max(image.size))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=PREVIEW_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")

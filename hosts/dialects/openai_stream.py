"""Images as OpenAI's server-sent events: partial images, then each finished one."""

import base64
import io
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from flask import current_app
from PIL import Image

from backends.errors import HostError
from hosts.http import media
from hosts.http.dialect import ErrorBody
from hosts.http.errors import field_of, status_of
from hosts.http.jobs_api import HEARTBEAT_S, event
from hosts.jobs.queue import Job, JobQueue

NO_TOKENS = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}
"""The usage in every event. This host does not count tokens."""
STILL_WAITING = ": still waiting\n\n"
"""A comment line. Sending it reveals whether the client has disconnected."""
LATENT_SCALE = 8
"""Image pixels per preview pixel."""


def image_events(
    jobs: Sequence[Job],
    encode: Callable[[Any], bytes],
    *,
    kind: str,
    output_format: str,
    num_partial: int,
    error_body: ErrorBody,
) -> Iterator[str]:
    """Yield the events of submitted jobs, one job after the other.

    kind: 'image_generation' or 'image_edit'. encode: a job's result -> its file. If the client
    disconnects, the jobs are cancelled.
    """
    queue: JobQueue = current_app.extensions["host"].queue
    for job in jobs:
        job.wants_preview = job.wants_preview or num_partial > 0
    facts = {"background": "opaque", "output_format": output_format, "quality": "auto"}

    def stream() -> Iterator[str]:
        try:
            for job in jobs:
                for index, preview in _previews(queue, job, num_partial):
                    if preview is None:
                        yield STILL_WAITING
                        continue
                    partial = {**facts, **_image(preview), "partial_image_index": index}
                    yield _event(f"{kind}.partial_image", partial)
                result = job.wait()
                size = f"{result.frames.shape[2]}x{result.frames.shape[1]}"
                for image in media.each_image(result, "image"):
                    done = {**facts, "b64_json": _base64(encode(image)), "size": size}
                    yield _event(f"{kind}.completed", {**done, "usage": NO_TOKENS})
        except HostError as error:
            yield event("error", error_body(str(error), status_of(error), field_of(error)))
        finally:
            for job in jobs:
                queue.cancel(job)

    return stream()


def _previews(queue: JobQueue, job: Job, number: int) -> Iterator[tuple[int, np.ndarray | None]]:
    """Yield up to `number` numbered previews, evenly over the steps, until the job is over.

    None stands for a long time without change.
    """
    version, sent = -1, 0
    while not job.finished.is_set():
        before, version = version, queue.wait_for_change(job, version, HEARTBEAT_S)
        is_due = job.num_steps and job.step * (number + 1) >= (sent + 1) * job.num_steps
        if version == before:
            yield sent, None
        elif sent < number and is_due and job.preview is not None:
            yield sent, job.preview
            sent += 1


def _image(preview: np.ndarray) -> dict[str, Any]:
    image = Image.fromarray(preview)
    size = image.width * LATENT_SCALE, image.height * LATENT_SCALE
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, format="PNG")
    return {
        "b64_json": _base64(buffer.getvalue()),
        "size": f"{size[0]}x{size[1]}",
        "output_format": "png",
    }


def _event(kind: str, data: dict[str, Any]) -> str:
    return event(kind, {"type": kind, "created_at": int(time.time()), **data})


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")

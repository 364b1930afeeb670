"""Request handling shared by all dialects: read JSON, submit and find the sender's jobs, choose a
content type, wait.
"""

import contextlib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from flask import current_app, request

from backends.errors import HostError, RequestError
from backends.request import GenerateRequest, GenerateResult, whole_number
from hosts.http import media
from hosts.http.identity.sender import client, new_owner, seen_owner
from hosts.http.limits import require_few_values, require_plain
from hosts.http.server import CONNECTION, Peer
from hosts.jobs.queue import Job

LOOK_EVERY_S = 0.5
MAX_KEY = 255
MAX_SEED = 2**63 - 1


def json_object() -> Mapping[str, Any]:
    """Return the body. RequestError if it is not one JSON object within all limits."""
    data = _data()
    require_few_values(data)
    try:
        body = json.loads(data)
    except RecursionError as error:
        raise RequestError(
            "the body is not valid JSON: its lists and objects are nested too deeply. Send a flat "
            "object."
        ) from error
    except ValueError as error:  # also text that is not UTF-8, and numbers of thousands of digits
        raise RequestError(
            f"the body is not valid JSON: {error}. Send one JSON object, as UTF-8."
        ) from error
    if not isinstance(body, Mapping):
        raise RequestError(f"the body must be one JSON object, not {type(body).__name__}.")
    require_plain(body)
    return body


def _data() -> bytes:
    """Return the bytes of the body. RequestError if its chunks cannot be read."""
    try:
        return request.get_data()
    except (ValueError, OverflowError, MemoryError) as error:
        raise RequestError(
            f"the body cannot be read: {error}. Send it with a Content-Length."
        ) from error


def submit(
    asked: GenerateRequest,
    *,
    is_kept: bool = False,
    is_stored: bool = False,
    key: str | None = None,
    series: str = "",
) -> Job:
    """Queue a request of the current request's sender; see JobQueue.submit."""
    return current_app.extensions["host"].queue.submit(
        asked,
        client=client(),
        owner=new_owner(),
        is_kept=is_kept,
        is_stored=is_stored,
        key=key,
        series=series,
    )


def find_job(job_id: str) -> Job:
    """Return a kept job of the sender. NotFoundError if it is unknown, or another's."""
    return current_app.extensions["host"].queue.find(job_id, owner=seen_owner())


def own_jobs() -> list[Job]:
    """Return the sender's jobs, in the order of JobQueue.jobs."""
    return current_app.extensions["host"].queue.jobs(owner=seen_owner())


def idempotency_key() -> str | None:
    """Return the client's name for the new job, or None. RequestError if it is not valid.

    Sending the same key again creates no second job.
    """
    key = request.headers.get("Idempotency-Key")
    if key is not None and (
        not 1 <= len(key) <= MAX_KEY or not key.isascii() or not key.isprintable()
    ):
        raise RequestError(
            f"Idempotency-Key must have 1 to {MAX_KEY} printable ASCII characters.",
            field="Idempotency-Key",
        )
    return key


def wanted_type(output: str, *, default: str) -> str:
    """Return the client's preferred content type for this kind of result, or `default`."""
    allowed = [
        default,
        *(kind for kind in (*media.content_types(output), "application/json") if kind != default),
    ]
    best = request.accept_mimetypes.best_match(allowed)
    if best is None and request.accept_mimetypes:
        raise RequestError(
            f"Accept: {request.accept_mimetypes} is not available. Allowed: {', '.join(allowed)}.",
            field="Accept",
        )
    return best or default


def seeds_from(seed: Any, number: int) -> list[Any]:
    """Return the seeds of several images, which count up from `seed` (a number or text).

    RequestError if they exceed the largest seed.
    """
    first = whole_number(seed)
    if first is None or first < 0:
        return [seed] * number
    if first <= MAX_SEED < first + number - 1:
        raise RequestError(
            f"seed={first} leaves no seeds for {number} images. Allowed for them: up to "
            f"{MAX_SEED - number + 1}.",
            field="seed",
        )
    return [first + index for index in range(number)]


def submit_all(
    requests: Sequence[GenerateRequest], *, is_kept: bool = False, is_stored: bool = False
) -> list[Job]:
    """Submit all requests at once, so that the ranks can share them out.

    If the queue has no room for all, none is submitted. is_stored: whether the jobs outlive the
    ranks; they are then submitted one by one.
    """
    queue = current_app.extensions["host"].queue
    jobs: list[Job] = []
    series = secrets.token_hex(8)
    with contextlib.nullcontext() if is_stored else queue.together():
        try:
            for asked in requests:
                jobs.append(submit(asked, is_kept=is_kept, is_stored=is_stored, series=series))
        except HostError:
            for job in jobs:
                queue.cancel(job)
            raise
    return jobs


def wait_for(job: Job, *, is_kept: bool = False) -> GenerateResult:
    """Block until the job is over and return its result.

    If the client disconnects, the job is cancelled after a grace period, unless it is kept.
    """
    host = current_app.extensions["host"]
    connection, grace_s = request.environ.get(CONNECTION), host.settings.disconnect_grace
    if connection is None or grace_s == 0 or is_kept:
        return job.wait()
    peer = Peer(connection, takes_interim=request.environ["SERVER_PROTOCOL"] == "HTTP/1.1")
    gone_at: float | None = None
    while (result := job.wait(LOOK_EVERY_S)) is None:
        if not peer.is_gone():
            continue
        gone_at = gone_at or time.monotonic()
        if time.monotonic() - gone_at >= grace_s:
            host.queue.cancel(
                job, f"the client went away and did not come back within {grace_s} s."
            )
    return result


def wait_for_all(jobs: Sequence[Job]) -> list[GenerateResult]:
    """Return the results of all jobs. If one fails, cancel the others and raise its error."""
    try:
        return [wait_for(job) for job in jobs]
    except HostError:
        for job in jobs:
            current_app.extensions["host"].queue.cancel(job)
        raise

"""Asks a class over HTTP: a launcher of its own on the checkpoint's folder, as a user starts it, a
job with the same values as plain diffusers, and all pixels of its result.
"""

import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from backends.errors import RequestError
from backends.files.generic import generic_spec
from hosts.http.media import ARRAY_TYPE, png
from tests.backends.generic_page import HTTP, Outcome
from tests.backends.generic_requests import (
    SEED,
    checkpoint_of,
    fields_of,
    largest_difference,
    plain_frames,
    reason_of,
)
from tests.hosts.harness import RunningHost, start_launcher
from tests.hosts.sending import over

MOST = 256
"""Pixels of a side, where neither the test of a class nor its checkpoint says how many."""


def over_http(name: str, num_ranks: int) -> Outcome:
    """Compare a launcher with plain diffusers. A figure, or what the host or diffusers said."""
    torch.set_num_threads(1)
    outcome = Outcome(name=name)
    try:
        outcome.http[HTTP[num_ranks]] = _difference(name, num_ranks)
    except AssertionError as error:  # with the log of a host that does not start
        outcome.http[HTTP[num_ranks]] = str(error).strip().splitlines()[-1][:300]
    except Exception as error:  # whatever a pipeline of diffusers raises
        outcome.http[HTTP[num_ranks]] = reason_of(error)
    return outcome


def _difference(name: str, num_ranks: int) -> float:
    folder = checkpoint_of(name)
    spec = generic_spec(folder)
    with start_launcher(f"--checkpoint={folder}", f"--nproc_per_node={num_ranks}") as host:
        fields = fields_of(name, spec)
        host.wait_until_listening()
        taken = fields_taken(host)
        for size in ("height", "width"):  # a row's own default is for published checkpoints
            if size not in fields and "default" in taken.get(size, {}) and size in spec.takes:
                fields[size] = min(getattr(spec, size), MOST)
        want = plain_frames(name, spec, fields)
        host.wait_until_ready()
        got = frames_over_http(host, fields, is_video=spec.output == "video")
    return largest_difference(want, got)


def fields_taken(host: RunningHost) -> dict[str, Any]:
    """Return the fields of a request, as the host documents them."""
    document = host.get("/openapi.json").json()
    return document["components"]["schemas"]["Request"]["properties"]


def frames_over_http(host: RunningHost, fields: dict[str, Any], *, is_video: bool) -> np.ndarray:
    """Return uint8 (N, H, W, C): PNG files of all images of the job, or the frames of its video."""
    body = {key: encoded(value) for key, value in fields.items()} | {"seed": SEED}
    answer = host.session.post(host.url("/v1/jobs"), json=body, timeout=60)
    if answer.status_code != 202:
        raise RequestError(f"{answer.status_code} {answer.json()['message']}", field="")
    job = answer.json()["id"]
    over(host, job, within_s=240)
    place = f"/v1/jobs/{job}/result"
    file = host.get(place)  # a PNG or an MP4
    if file.status_code != 200:
        raise RequestError(f"{file.status_code} {file.json()['message']}", field="")
    if is_video:
        return np.load(io.BytesIO(host.get(place, headers={"Accept": ARRAY_TYPE}).content))
    count = int(file.headers.get("X-Images", 1))
    files = [file, *(host.get(f"{place}?image={number}") for number in range(1, count))]
    return np.stack([np.asarray(Image.open(io.BytesIO(each.content))) for each in files])


def encoded(value: Any) -> Any:
    """Return a field as a request has it. `arguments` are so already."""
    if isinstance(value, list):
        return [encoded(each) for each in value]
    return png(value) if isinstance(value, Image.Image) else value

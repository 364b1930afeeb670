"""Asks classes over HTTP: launchers on the folders of their checkpoints, as a user starts them, the
values of plain diffusers in jobs, and all pixels of their results.
"""

import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from backends.errors import RequestError
from backends.files.checkpoint import infer_type
from backends.files.generic import generic_spec
from backends.model_table import GENERIC, read_table
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

TOGETHER = 20
"""Classes that one launcher serves."""
MOST = 256
"""Pixels of a side, where neither the test of a class nor its checkpoint says how many."""


RENDER_WITHIN_S = 240
"""For what comes after the last step, which takes Shap-E's renderer long."""


def over_http(names: list[str], num_ranks: int, *, together: bool = False) -> Iterator[Outcome]:
    """Compare launchers with plain diffusers. A figure, or what the host or diffusers said.

    together: one launcher serves several classes, with --models, instead of one each.
    """
    torch.set_num_threads(1)
    if not together:
        for name in names:
            yield from _asked([name], num_ranks, f"--checkpoint={checkpoint_of(name)}")
        return
    for start in range(0, len(names), TOGETHER):
        some = names[start : start + TOGETHER]
        with tempfile.TemporaryDirectory() as folder:
            for name in some:
                (Path(folder) / name).symlink_to(checkpoint_of(name))
            yield from _asked(some, num_ranks, f"--models={folder}", has_names=True)


def _asked(
    names: list[str], num_ranks: int, model: str, *, has_names: bool = False
) -> Iterator[Outcome]:
    """Start a launcher with this argument and ask it for each class. has_names: by its name."""
    left = list(names)
    try:
        with start_launcher(
            model, f"--nproc_per_node={num_ranks}", f"--failure_timeout={RENDER_WITHIN_S}"
        ) as host:
            for name in names:
                figure = _figure(host, name, {"model": name} if has_names else {})
                yield Outcome(name=left.pop(0), http={HTTP[num_ranks]: figure})
    except AssertionError as error:  # with the log of a host that does not start
        why = str(error).strip().splitlines()[-1][:300]
        yield from (Outcome(name=name, http={HTTP[num_ranks]: why}) for name in left)


def _figure(host: RunningHost, name: str, named: dict[str, str]) -> float | str:
    try:
        spec, fields = generic_spec(checkpoint_of(name)), _fields(name)
        want = plain_frames(name, spec, fields)
    except Exception as error:  # whatever a pipeline of diffusers raises
        return f"plain diffusers: {reason_of(error)}"
    host.wait_until_ready()
    try:
        got = frames_over_http(host, fields | named, is_video=spec.output == "video")
    except Exception as error:  # refused, or not a result
        return reason_of(error)
    return largest_difference(want, got)


def _fields(name: str) -> dict[str, Any]:
    folder = checkpoint_of(name)
    spec = generic_spec(folder)
    fields = fields_of(name, spec)
    has_row = infer_type(folder, read_table())[0] != GENERIC
    for size in ("height", "width"):
        if has_row and size not in fields and size in spec.takes:
            fields[size] = min(getattr(spec, size), MOST)  # the row's is for published checkpoints
    return fields


def frames_over_http(host: RunningHost, fields: dict[str, Any], *, is_video: bool) -> np.ndarray:
    """Return uint8 (N, H, W, C): PNG files of all images of the job, or the frames of its video."""
    body = {key: encoded(value) for key, value in fields.items()} | {"seed": SEED}
    answer = host.session.post(host.url("/v1/jobs"), json=body, timeout=60)
    if answer.status_code != 202:
        raise RequestError(f"{answer.status_code} {answer.json()['message']}", field="")
    job = answer.json()["id"]
    over(host, job, within_s=RENDER_WITHIN_S)
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

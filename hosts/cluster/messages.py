"""Messages between gateway and host: requests as fields of POST /v1/jobs, errors by status. No
torch.
"""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from backends.request import GenerateRequest
from hosts.http import media

ELSEWHERE = frozenset({0, 404, 429, 503})
"""Status codes after which another replica may run the job: unreachable, job unknown, queue
full, not ready.
"""


def fields_of(request: GenerateRequest) -> dict[str, Any]:
    """Return the JSON of POST /v1/jobs from which a host reads the same request.

    Images are sent as PNG, so no pixel changes.
    """
    values = {name: getattr(request, name) for name in sorted(request.model_fields_set)}
    fields = {name: _packed(value) for name, value in values.items() if value is not None}
    return {**fields, "strict": False}  # the gateway has already applied its dialect's rules


def preview(jpeg: bytes) -> np.ndarray:
    """Return the image of an event as uint8 (h, w, 3)."""
    with Image.open(io.BytesIO(jpeg)) as image:
        return np.asarray(image.convert("RGB"))


def spans_of(trace: Mapping[str, Any]) -> dict[int, list[tuple[str, float, float]]]:
    """Recover a job's spans from its Chrome trace, without the replica's queue time."""
    spans: dict[int, list[tuple[str, float, float]]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X" and event["name"] != "queue":
            stage = "step" if event["name"].startswith("step ") else event["name"]
            spans.setdefault(event["tid"], []).append(
                (stage, event["ts"] / 1e6, event["dur"] / 1e6)
            )
    return spans


def _packed(value: Any) -> Any:
    if isinstance(value, Image.Image):
        return media.png(value)
    if isinstance(value, np.ndarray):
        return media.npy(value)
    if isinstance(value, list):
        return [_packed(each) for each in value]
    return value

"""What a gateway says to a host and hears from it: requests as the fields of POST /v1/jobs, errors
by their status. Imports no torch.
"""

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from backends.errors import (
    BusyError,
    CancelledError,
    HostError,
    NotFoundError,
    RequestError,
    UnavailableError,
    UnsupportedError,
)
from backends.request import GenerateRequest
from hosts.compat import codec

SENT_AS = {"ip_adapter_image": "ip_image"}
"""Request field -> the name of an image that is sent under another."""
KINDS: dict[int, type[HostError]] = {
    400: RequestError,
    404: NotFoundError,
    409: CancelledError,
    422: UnsupportedError,
    429: BusyError,
    503: UnavailableError,
}
"""The reverse of hosts/http/app.py's table."""
ELSEWHERE = frozenset({0, 404, 429, 503})
"""Status of an answer after which another replica may do the job: nobody there, job forgotten, no
room, not ready.
"""
EMBEDS = (
    "prompt_embeds",
    "pooled_prompt_embeds",
    "negative_prompt_embeds",
    "negative_pooled_prompt_embeds",
)


def fields_of(request: GenerateRequest) -> dict[str, Any]:
    """The JSON of POST /v1/jobs from which a host reads the same request. Images travel as PNG, so
    every pixel stays.
    """
    fields: dict[str, Any] = {}
    for name in sorted(request.model_fields_set - set(EMBEDS)):
        value = getattr(request, name)
        if isinstance(value, Image.Image):
            value = _png(value)
        elif isinstance(value, list) and value and isinstance(value[0], Image.Image):
            value = [_png(image) for image in value]
        if name == "latents" and value is not None:
            fields["latent"] = codec.encode_latents(value)
        elif value is not None:
            fields[SENT_AS.get(name, name)] = value
    for side, prefix in (("positive", ""), ("negative", "negative_")):
        if (embeds := getattr(request, f"{prefix}prompt_embeds")) is not None:
            fields[f"{side}_embeds"] = codec.encode_conditioning(embeds, _pooled(request, prefix))
    return fields


def as_error(status: int, message: str) -> HostError:
    """What a host said, as the error that it was there."""
    return KINDS.get(status, HostError)(message)


def preview(jpeg: bytes) -> np.ndarray:
    """uint8 (h, w, 3) of an event's image."""
    with Image.open(io.BytesIO(jpeg)) as image:
        return np.asarray(image.convert("RGB"))


def spans_of(trace: Mapping[str, Any]) -> dict[int, list[tuple[str, float, float]]]:
    """What hosts/jobs/trace.py was told, out of what it made of it; without the time in the
    replica's queue.
    """
    spans: dict[int, list[tuple[str, float, float]]] = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "X" and event["name"] != "queue":
            stage = "step" if event["name"].startswith("step ") else event["name"]
            spans.setdefault(event["tid"], []).append(
                (stage, event["ts"] / 1e6, event["dur"] / 1e6)
            )
    return spans


def _pooled(request: GenerateRequest, prefix: str) -> np.ndarray | None:
    return request.negative_pooled_prompt_embeds if prefix else request.pooled_prompt_embeds


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")

"""OpenAI's fields of images and videos: their /v1/jobs counterparts and their rules."""

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flask import request

from backends.errors import RequestError, UnsupportedError
from backends.generation.admission import lengths_around
from backends.model_table import ModelSpec
from backends.request import GenerateRequest, whole_number
from hosts.http.decode import Accepted, read_mask, read_transparency
from hosts.http.dialect import (
    DONE,
    Rule,
    choice,
    contradiction,
    harmless,
    is_empty,
    is_strict,
    neutral,
    refused,
    require_once,
    shown,
)
from hosts.http.limits import require_plain
from hosts.http.request_io import json_object

ALIASES = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "closeness": "quality",
}
SAME = (
    ("steps", "num_inference_steps"),
    ("guidance", "guidance_scale"),
    ("image", "images", "init_image"),
    ("mask", "mask_image"),
)
"""Names of one thing. A request has one of them."""
QUALITIES = ("auto", "standard", "hd", "low", "medium", "high", "xhigh", "max")
"""OpenAI's values of `quality`. Here the number of steps sets it; 'exact' is our own. Our field of
that name is `closeness` here.
"""
FIDELITIES: dict[str, dict[str, Any]] = {"low": {}, "high": {"strength": 0.5}}
"""Values of `input_fidelity`, and what they mean where an image is the start. A model that takes
images to edit or to refer to keeps to them anyway.
"""
MAX_IMAGES = 10
MAX_PARTIAL = 3
MAX_SECONDS = 3600
OWN = dict.fromkeys((*(set(GenerateRequest.model_fields) - {"image"}), *ALIASES), DONE)
"""Fields of /v1/jobs that requests may have besides OpenAI's."""
NO_TRACKING = "this host neither moderates nor tracks"
NO_SVG = "only raster images are available"
QUALITY = neutral(
    *QUALITIES, "exact", reason="OpenAI has no such quality. closeness chooses how exact it is"
)
IMAGES: dict[str, Rule] = {
    **OWN,
    "n": DONE,
    "size": DONE,
    "response_format": DONE,
    "output_format": DONE,
    "output_compression": DONE,
    "stream": DONE,
    "partial_images": DONE,
    "quality": QUALITY,
    "background": neutral("auto", "opaque", reason="images have no transparent parts here"),
    "style": neutral("vivid", "natural", reason="the prompt sets the style"),
    "moderation": harmless(NO_TRACKING),
    "user": harmless(NO_TRACKING),
    "safety_identifier": harmless(NO_TRACKING),
    "complexity": refused(NO_SVG),
    "svg": refused(NO_SVG),
    "frame_count": neutral(1, reason="one image has one frame; videos are at /v1/videos"),
    "frame_duration_ms": refused("one image has no duration; videos are at /v1/videos"),
}
"""POST /v1/images/generations."""
EDITS: dict[str, Rule] = {
    **IMAGES,
    "image": DONE,
    "images": DONE,
    "mask": DONE,
    "markup": refused("only a mask can select what to change"),
    "input_fidelity": DONE,
}
"""POST /v1/images/edits."""
VARIATIONS: dict[str, Rule] = {**IMAGES, "image": DONE}
"""POST /v1/images/variations."""
REMIX: dict[str, Rule] = {"prompt": DONE}
"""POST /v1/videos/{id}/remix."""
VIDEOS: dict[str, Rule] = {
    **OWN,
    "quality": QUALITY,
    "input_reference": DONE,
    "image": DONE,
    "seconds": DONE,
    "size": DONE,
    "user": harmless(NO_TRACKING),
}
"""POST /v1/videos."""
HINTS = {"negative": "negative_prompt", "cfg_scale": "guidance_scale", "num_images": "n"}
NUMBERS = {
    name
    for name, field in GenerateRequest.model_fields.items()
    if "int" in str(field.annotation) or "float" in str(field.annotation)
} | {*ALIASES, "n", "output_compression", "partial_images", "seconds"}
NUMBERS -= {"lora", "sigmas", "timesteps"}
SWITCHES = {"stream", "compel"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The contents of a request apart from the images."""

    fields: dict[str, Any]
    """With the names of /v1/jobs."""
    sent_as: dict[str, str]
    """Field -> OpenAI's name, where it differs."""


def body_of_request() -> dict[str, Any]:
    """Return the body: JSON, or a form with files and text converted to numbers and booleans."""
    if request.mimetype == "application/json":
        return dict(json_object())
    if None in (*request.form, *request.files):
        raise RequestError("a part of the form has no name. Give each part the name of a field.")
    body: dict[str, Any] = {
        name: _of_form(name, value) for name, value in request.form.items() if value != ""
    }
    require_plain(body)
    for name in request.files:
        many = [
            base64.b64encode(file.read()).decode("ascii") for file in request.files.getlist(name)
        ]
        key = name.removesuffix("[]")
        body[key] = [*_list(body.get(key)), *many]
    return body


def asked_for(body: Mapping[str, Any]) -> Asked:
    """Convert OpenAI's fields to those of /v1/jobs."""
    for names in SAME:
        require_once(body, *names)
    fields, sent_as = {}, {}
    for name, value in body.items():
        field = ALIASES.get(name, name)
        is_openais = name == "quality" and str(value).strip().lower() in QUALITIES
        if field in OWN and not is_empty(value) and not is_openais:
            fields[field], sent_as[field] = value, name
    quality, own = (str(body.get(name) or "").strip().lower() for name in ("quality", "closeness"))
    if quality == "exact" and own not in ("", "exact"):
        raise contradiction(body, "quality", "closeness")
    if size := _size(body.get("size")):
        for side, length in zip(("width", "height"), size, strict=True):
            given = fields.get(side, length)
            if whole_number(given) != length and is_strict(body):
                raise contradiction(body, "size", side)
            fields[side] = length
        sent_as |= {"width": "size", "height": "size"}
    return Asked(fields=fields, sent_as=sent_as)


def edited(
    body: Mapping[str, Any],
    asked: Asked,
    accepted: Accepted,
    *,
    spec: ModelSpec,
    has_mask: bool = True,
) -> Asked:
    """Add the images to edit and the mask: the transparent parts of `mask`, else those of the first
    image. has_mask: whether there can be one.

    A model that takes several images gets all of them. Else the first one is where it starts, and
    further ones go to the IP-Adapter, if there is one.
    """
    start = "image" if spec.most_images > 0 else "init_image"
    name = "image" if _list(body.get("image")) else "images"
    asked = Asked(fields=asked.fields, sent_as={"mask_image": "mask", **asked.sent_as})
    first, *others = [_image(each, name) for each in _list(body.get(name))] or [None]
    if first is None:
        raise RequestError("image is missing. Send the image to change.", field="image")
    kept = choice(body, "input_fidelity", FIDELITIES, {})
    fields = {**(kept if start == "init_image" else {}), **asked.fields, start: first}
    sent_as = {**asked.sent_as, start: name}
    if others and spec.most_images > 1:
        fields["image"] = [first, *others]
        others = []
    if others and not accepted.takes_ip_image:
        raise UnsupportedError(
            f"{name} holds {1 + len(others)} images, and no IP-Adapter is loaded (--ip_adapter) "
            "that could use more than one. Send one image.",
            field=name,
        )
    if others:
        fields["ip_adapter_image"], sent_as["ip_adapter_image"] = others, name
    masks = _list(body.get("mask"))
    if len(masks) > 1:
        raise RequestError(f"mask holds {len(masks)} images. Send one.", field="mask")
    if masks:
        fields["mask_image"] = read_mask(
            _image(masks[0], "mask"), field="mask", accepted=accepted, changes="transparent"
        )
    elif has_mask and is_empty(fields.get("mask_image")):
        mask = _transparency(body, first, name, accepted, spec)
        fields |= {"mask_image": mask} if mask is not None else {}
    return Asked(fields=fields, sent_as=sent_as)


def _transparency(
    body: Mapping[str, Any], image: Any, name: str, accepted: Accepted, spec: ModelSpec
) -> Any:
    """Return the transparent parts of an image as its mask, as in OpenAI's API; None if it has
    none.
    """
    unused = accepted.unused(spec).get("mask_image")
    if unused and not is_strict(body):
        return None
    mask = read_transparency(image, field=name, accepted=accepted)
    if mask is not None and unused:
        raise UnsupportedError(
            f"{name} has transparent parts, which are a mask in this API, and masks are not "
            f"available: {unused}. Send it without an alpha channel.",
            field=name,
        )
    return mask


def varied(body: Mapping[str, Any], asked: Asked, accepted: Accepted, *, spec: ModelSpec) -> Asked:
    """Add the image to vary: for the IP-Adapter if there is one, else it is where to start.

    Without a prompt there is an empty one.
    """
    prompt = asked.fields.get("prompt") or " "  # text encoders read a space as no token
    one = _list(body.get("image"))
    if len(one) > 1:
        raise RequestError(f"image holds {len(one)} images. Send one.", field="image")
    if not (one and accepted.takes_ip_image):
        asked = edited(body, asked, accepted, spec=spec, has_mask=False)
        return Asked(fields={**asked.fields, "prompt": prompt}, sent_as=asked.sent_as)
    fields = {**asked.fields, "prompt": prompt, "ip_adapter_image": _image(one[0], "image")}
    return Asked(fields=fields, sent_as={**asked.sent_as, "ip_adapter_image": "image"})


def filmed(body: Mapping[str, Any], asked: Asked, *, spec: ModelSpec) -> Asked:
    """Add the first image and the number of frames that the requested seconds take: of those that
    the model can make the nearest.
    """
    fields, sent_as = dict(asked.fields), dict(asked.sent_as)
    require_once(body, "input_reference", "image")
    for name in ("input_reference", "image"):
        if images := _list(body.get(name)):
            if len(images) > 1:
                raise RequestError(f"{name} holds {len(images)} images. Send one.", field=name)
            fields["image"], sent_as["image"] = _image(images[0], name), name
            break
    if not is_empty(body.get("seconds")):
        if "num_frames" in fields and is_strict(body):
            raise contradiction(body, "seconds", "num_frames")
        speed = whole_number(fields.get("fps")) or 0
        speed = speed if speed > 0 else spec.frames_per_s
        frames = max(1, round(_seconds(body["seconds"]) * speed))
        around = [each for each in lengths_around(frames, fields, spec) if each]
        fields["num_frames"] = min(around, key=lambda length: abs(length - frames))
        sent_as["num_frames"] = "seconds"
    return Asked(fields=fields, sent_as=sent_as)


def _size(value: Any) -> tuple[int, int] | None:
    text = str(value).strip().lower()
    if is_empty(value) or text == "auto":
        return None
    match = re.fullmatch(r"(\d{1,5})\s*x\s*(\d{1,5})", text, re.ASCII)
    if match is None:
        raise RequestError(
            f"size={shown(value)} is not allowed. Send WIDTHxHEIGHT, such as 1024x1024, or auto.",
            field="size",
        )
    return int(match[1]), int(match[2])


def _seconds(value: Any) -> float:
    try:
        seconds = float(value) if not isinstance(value, bool) else -1.0
    except (TypeError, ValueError, OverflowError):
        seconds = -1.0
    if not 0 < seconds <= MAX_SECONDS:
        raise RequestError(
            f"seconds={shown(value)} is not allowed. Send a number of seconds up to {MAX_SECONDS}.",
            field="seconds",
        )
    return seconds


def _image(value: Any, name: str) -> Any:
    """Return base64 from text or from the object {"image_url": "data:..."}."""
    if not isinstance(value, Mapping):
        return value
    url = value.get("image_url")
    url = url.get("url") if isinstance(url, Mapping) else url
    if not isinstance(url, str) or not url[:5].lower() == "data:":
        raise UnsupportedError(
            f"{name} names an image elsewhere, and this host fetches nothing. Send a data: URL as "
            "image_url, or the file itself.",
            field=name,
        )
    return url


def _list(value: Any) -> list[Any]:
    return [each for each in (value if isinstance(value, list) else [value]) if not is_empty(each)]


def _of_form(name: str, text: str) -> Any:
    """Convert a form's text to the number or boolean that the field takes."""
    if name in SWITCHES and text.strip().lower() in ("true", "false", "1", "0"):
        return text.strip().lower() in ("true", "1")
    if name not in NUMBERS:
        return text
    try:
        return int(text) if re.fullmatch(r"-?\d{1,30}", text, re.ASCII) else float(text)
    except ValueError as error:
        raise RequestError(f"{name}={shown(text)} is not a number.", field=name) from error

"""A1111's extras (/sdapi/v1/extra-single-image): enlarge an image without generating one."""

import base64
import io
from collections.abc import Mapping
from typing import Any

from flask import Blueprint, Response, current_app, jsonify
from PIL import Image, ImageOps

from backends.errors import RequestError
from hosts.dialects.a1111_passes import IMAGE_UPSCALERS, MAX_SCALE
from hosts.http.decode import read_image, read_request
from hosts.http.dialect import (
    DONE,
    Operation,
    Rule,
    harmless,
    is_empty,
    neutral,
    require_known,
    shown,
    truth,
    whole,
)
from hosts.http.request_io import json_object, submit, wait_for

blueprint = Blueprint("a1111_extras", __name__)

NO_FACES = "face restoration is not supported"
RULES: dict[str, Rule] = {
    "image": DONE,
    "upscaler_1": DONE,
    "resize_mode": DONE,
    "upscaling_resize": DONE,
    "upscaling_resize_w": DONE,
    "upscaling_resize_h": DONE,
    "upscaling_crop": DONE,
    "upscaler_2": neutral("none", reason="one upscaler is used"),
    "extras_upscaler_2_visibility": neutral(0, reason="one upscaler is used"),
    "gfpgan_visibility": neutral(0, reason=NO_FACES),
    "codeformer_visibility": neutral(0, reason=NO_FACES),
    "codeformer_weight": harmless(NO_FACES),
    "upscale_first": harmless("nothing else is done to the image"),
    "show_extras_results": harmless("the image is always returned"),
}
OPERATIONS = (
    Operation(
        method="post",
        path="/sdapi/v1/extra-single-image",
        summary="A1111: enlarge an image.",
        rules=RULES,
    ),
)
BY_FACTOR, TO_SIZE = 0, 1
"""Values of resize_mode."""
MOST_PASSES = 3
"""Of a network, until the image is large enough."""


@blueprint.post("/sdapi/v1/extra-single-image")
def extra_single_image() -> Response:
    """Enlarge an image with one of GET /sdapi/v1/upscalers: by a factor, or to cover a size."""
    body = json_object()
    require_known(body, RULES)
    host = current_app.extensions["host"]
    if is_empty(body.get("image")):
        raise RequestError("image is missing. Send base64 of a PNG, JPEG or WebP.", field="image")
    image = read_image(body["image"], field="image", accepted=host.accepted)
    name = _upscaler(body)
    width, height, crop = _target(body, image)
    if max(width, height) > host.settings.max_side:
        raise RequestError(
            f"the result would be {width}x{height}. Allowed: sides up to "
            f"{host.settings.max_side} (--max_side). Send a smaller factor or size.",
            field="upscaling_resize",
        )
    if name in IMAGE_UPSCALERS:
        large = image.resize((width, height), IMAGE_UPSCALERS[name])
    else:
        large = _enlarged(image, name, (width, height))
    return jsonify({"html_info": "", "image": _png(ImageOps.fit(large, crop) if crop else large)})


def _upscaler(body: Mapping[str, Any]) -> str:
    known = (*IMAGE_UPSCALERS, *current_app.extensions["host"].accepted.upscalers)
    names = {name.lower(): name for name in known}
    value = body.get("upscaler_1")
    found = "None" if is_empty(value) else names.get(str(value).lower())
    if found is None:
        raise RequestError(
            f"upscaler_1={shown(value)} is not an upscaler here. Allowed: {', '.join(known)}.",
            field="upscaler_1",
        )
    return found


def _target(body: Mapping[str, Any], image: Image.Image) -> tuple[int, int, tuple[int, int] | None]:
    """Return the size to enlarge to, and that to crop the middle of it to."""
    mode = whole(body, "resize_mode", BY_FACTOR, low=BY_FACTOR, high=TO_SIZE)
    if mode == BY_FACTOR:
        scale = _factor(body.get("upscaling_resize"))
        return int(image.width * scale), int(image.height * scale), None
    sides = [whole(body, f"upscaling_resize_{side}", 512, low=1, high=10**6) for side in "wh"]
    scale = max(sides[0] / image.width, sides[1] / image.height)
    width, height = (round(side * scale) for side in image.size)
    is_cropped = truth(body, "upscaling_crop", True)
    return width, height, (sides[0], sides[1]) if is_cropped else None


def _factor(value: Any) -> float:
    try:
        factor = 2.0 if is_empty(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        factor = 0.0
    if isinstance(value, bool) or not 1 <= factor <= MAX_SCALE:
        raise RequestError(
            f"upscaling_resize={shown(value)} is not allowed. Allowed: 1 to {MAX_SCALE}.",
            field="upscaling_resize",
        )
    return factor


def _enlarged(image: Image.Image, name: str, size: tuple[int, int]) -> Image.Image:
    """Let the network enlarge the image until it has the size, and resize it to that."""
    host = current_app.extensions["host"]
    for _ in range(MOST_PASSES):
        if image.width >= size[0] and image.height >= size[1]:
            break
        fields = {"prompt": " ", "init_image": image, "strength": 0.0, "upscaler": name}
        asked = read_request(fields, spec=host.spec, accepted=host.accepted)
        image = Image.fromarray(wait_for(submit(asked)).frames[0])
    return image.resize(size, Image.Resampling.LANCZOS)


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")

"""A1111's extras (/sdapi/v1/extra-single-image, extra-batch-images): enlarge images without
generating one.
"""

import base64
import io
from collections.abc import Mapping, Sequence
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

ON = (True, "true", "on", "yes", "1")
NO_FACES = "face restoration is not supported"
RULES: dict[str, Rule] = {
    "image": DONE,
    "upscaler_1": DONE,
    "resize_mode": DONE,
    "upscaling_resize": DONE,
    "upscaling_resize_w": DONE,
    "upscaling_resize_h": DONE,
    "upscaling_crop": DONE,
    "upscaling_resize_crop": neutral(*ON, reason="send upscaling_crop"),
    "upscaler_2": neutral("none", reason="one upscaler is used"),
    "extras_upscaler_2_visibility": neutral(0, reason="one upscaler is used"),
    "gfpgan_visibility": neutral(0, reason=NO_FACES),
    "codeformer_visibility": neutral(0, reason=NO_FACES),
    "codeformer_weight": harmless(NO_FACES),
    "upscale_first": harmless("nothing else is done to the image"),
    "show_extras_results": harmless("the image is always returned"),
}
BATCH: dict[str, Rule] = {
    **{name: rule for name, rule in RULES.items() if name != "image"},
    "imageList": DONE,
}
FILE: dict[str, Rule] = {"data": DONE, "name": harmless("the answer has no names")}
"""The fields of one image of imageList."""
OPERATIONS = (
    Operation(
        method="post",
        path="/sdapi/v1/extra-single-image",
        summary="A1111: enlarge an image.",
        rules=RULES,
    ),
    Operation(
        method="post",
        path="/sdapi/v1/extra-batch-images",
        summary="A1111: enlarge several images.",
        rules=BATCH,
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
    return jsonify({"html_info": "", "image": _answered(body, [body.get("image")], "image")[0]})


@blueprint.post("/sdapi/v1/extra-batch-images")
def extra_batch_images() -> Response:
    """Enlarge several images alike."""
    body = json_object()
    require_known(body, BATCH)
    files, most = body.get("imageList"), current_app.extensions["host"].settings.max_images
    if not isinstance(files, list) or not 1 <= len(files) <= most:
        raise RequestError(
            f"imageList={shown(files)} is not allowed. Send 1 to {most} objects with the base64 of "
            "a file as data.",
            field="imageList",
        )
    for file in files:
        if not isinstance(file, Mapping):
            raise RequestError(
                f"imageList has {shown(file)}. Send objects with data.", field="imageList"
            )
        require_known(file, FILE)
    images = _answered(body, [file.get("data") for file in files], "imageList")
    return jsonify({"html_info": "", "images": images})


def _answered(body: Mapping[str, Any], sources: Sequence[Any], field: str) -> list[str]:
    """Return the images enlarged, as base64 of PNG files. All are read before one is enlarged."""
    host, name = current_app.extensions["host"], _upscaler(body)
    images, targets = [], []
    for source in sources:
        if is_empty(source):
            raise RequestError(
                f"{field} is missing. Send base64 of a PNG, JPEG or WebP.", field=field
            )
        images.append(read_image(source, field=field, accepted=host.accepted))
        width, height, crop = _target(body, images[-1])
        if max(width, height) > host.settings.max_side:
            raise RequestError(
                f"the result would be {width}x{height}. Allowed: sides up to "
                f"{host.settings.max_side} (--max_side). Send a smaller factor or size.",
                field="upscaling_resize",
            )
        targets.append(((width, height), crop))
    found = []
    for image, (size, crop) in zip(images, targets, strict=True):
        if name in IMAGE_UPSCALERS:
            large = image.resize(size, IMAGE_UPSCALERS[name])
        else:
            large = _enlarged(image, name, size)
        found.append(_png(ImageOps.fit(large, crop) if crop else large))
    return found


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

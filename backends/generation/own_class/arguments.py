"""GenerateRequest -> the arguments of a pipeline class as diffusers has it. Imports no torch."""

import base64
import io
import logging
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from backends.files.generic import CARRIED, LISTED_IMAGES, carrier
from backends.model_table import ModelSpec
from backends.request import GenerateRequest

logger = logging.getLogger(__name__)

LISTS = ("conditioning_frames",)
"""Arguments that are a list even of one image."""
INTERMEDIATE = "intermediate_timesteps"
_DEFAULTED = ("denoising_end", "control_guidance_start", "control_guidance_end")
"""Fields whose defaults are diffusers' too, so that they need not be passed."""


def resolve_generic(
    request: GenerateRequest, spec: ModelSpec, *, defaults: Mapping[str, Any]
) -> GenerateRequest:
    """Return the request with the values given at launch filled in, and those of a row. The class
    has the other ones, such as a size that follows from its image.
    """
    filled = {
        field: getattr(request, field) if getattr(request, field) is not None else default
        for field, default in defaults.items()
    }
    if not spec.is_generic:
        filled |= _whole_sizes(filled, spec)
        return request.model_copy(update=filled | _row_defaults(request, spec, filled))
    nothing = {"num_inference_steps": spec.num_inference_steps, "guidance_scale": None}
    own = {
        field: spec.parameters.get(carrier(spec.parameters, field) or "", otherwise)
        for field, otherwise in nothing.items()
        if filled.get(field) is None
    }
    if spec.output == "video" and request.fps is None:
        own["fps"] = spec.frames_per_s
    return request.model_copy(update=filled | own)


def _whole_sizes(filled: Mapping[str, Any], spec: ModelSpec) -> dict[str, int]:
    """Return the sides as the row's model can make them, for clients whose sizes are not checked:
    the next smaller multiple.
    """
    multiple = spec.size_multiple
    sides = {name: filled[name] for name in ("height", "width") if filled.get(name)}
    wrong = {name: side for name, side in sides.items() if side % multiple and side > multiple}
    whole = {name: side - side % multiple for name, side in wrong.items()}
    if whole:
        logger.info("%s reduced to %s: multiples of %d are needed", wrong, whole, multiple)
    return whole


def _row_defaults(
    request: GenerateRequest, spec: ModelSpec, filled: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a row says for what is still open. An image to be changed keeps its size, and a
    class that starts from an image has a size of its own for it.
    """
    facts = {name: getattr(spec, name) for name in ROW_DEFAULTS} | {"fps": spec.frames_per_s}
    if not spec.sizes_by_image:
        facts |= {"height": spec.height, "width": spec.width}
    changed = request.init_image or (request.image if request.mask_image else None)
    if changed is not None and filled["height"] is None and filled["width"] is None:
        width, height = (side - side % spec.size_multiple for side in changed.size)
        facts |= {"height": height, "width": width}
    given = {name: getattr(request, name) for name in facts} | dict(filled)
    return {
        name: value
        for name, value in facts.items()
        if given.get(name) is None and name in spec.takes
    }


def with_files(value: Any, read: Callable[[str, io.BytesIO], Any]) -> Any:
    """Return one of a request's `arguments`, as hosts/http/decode.py checked it, with its files
    read. read: takes the kind of a file, image or array, and its content.
    """
    if isinstance(value, list):
        return [with_files(each, read) for each in value]
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind == "object":
        return {name: with_files(each, read) for name, each in content.items()}
    return read(kind, io.BytesIO(base64.b64decode(content)))


ROW_DEFAULTS = ("num_inference_steps", "guidance_scale", "num_frames")


def asked_arguments(
    request: GenerateRequest,
    spec: ModelSpec,
    *,
    generator: Callable[[], Any],
    read: Callable[[Any], Any],
) -> dict[str, Any]:
    """Return the call's arguments: what was asked for, under the class's own names.

    generator: makes the value of the argument of that name. read: the value of each of `arguments`.
    """
    found: dict[str, Any] = {}
    for field in CARRIED:
        name = spec.guidance_argument if field == "guidance_scale" else carrier(
            spec.parameters, field
        )  # fmt: skip
        value = getattr(request, field)
        if field == "strength" and field not in request.model_fields_set:
            value = None  # each class has its own default
        if field in _DEFAULTED and value == GenerateRequest.model_fields[field].default:
            value = None
        is_listed = name in LISTS or (field == "image" and spec.pipeline in LISTED_IMAGES)
        if is_listed and isinstance(value, Image.Image):
            value = [value]
        if name and value is not None:
            found[name] = value
    found |= {name: value for name, value in spec.call.items() if name in spec.parameters}
    if "last_image" in spec.parameters and isinstance(request.image, list):
        image = carrier(spec.parameters, "image")
        found |= zip((image, "last_image"), request.image, strict=False)
    is_guided = spec.guidance == "cfg" and (request.guidance_scale or 0) > 1
    if spec.empty_negative and is_guided:
        found.setdefault("negative_prompt", spec.empty_negative)
    if "max_area" in spec.parameters and request.height and request.width:
        found["max_area"] = request.height * request.width  # else the class scales to its own
    if INTERMEDIATE in spec.parameters and found.get("num_inference_steps", 2) != 2:
        found[INTERMEDIATE] = None  # the default of the class is for two steps, and an error else
    if "generator" in spec.parameters:
        found["generator"] = generator()
    if "output_type" in spec.parameters:
        found["output_type"] = "np"
    found |= {name: read(value) for name, value in (request.arguments or {}).items()}
    return found

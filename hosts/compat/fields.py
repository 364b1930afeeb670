"""The JSON of POST /generate -> GenerateRequest. Old names and encodings live only in hosts/compat."""

import logging
from collections.abc import Mapping
from typing import Any

from PIL import Image
from pydantic import ValidationError

from backends.errors import RequestError
from backends.model_table import ModelSpec
from backends.request import GenerateRequest
from hosts.compat import codec

logger = logging.getLogger(__name__)

PLAIN = {
    "prompt": ("positive", "prompt"),
    "negative_prompt": ("negative", "negative_prompt"),
    "seed": ("seed",),
    "num_inference_steps": ("steps", "num_inference_steps"),
    "guidance_scale": ("cfg", "guidance_scale"),
    "clip_skip": ("clip_skip",),
    "height": ("height",),
    "width": ("width",),
    "strength": ("denoise", "denoising_start", "strength"),
    "denoising_end": ("denoising_end",),
    "scheduler": ("scheduler",),
    "num_frames": ("frames", "num_frames"),
    "decode_chunk_size": ("decode_chunk_size",),
    "motion_bucket_id": ("motion_bucket_id",),
    "noise_aug_strength": ("noise_aug_strength",),
    "controlnet_conditioning_scale": ("controlnet_scale", "controlnet_conditioning_scale"),
    "warmup_steps": ("warmup_steps",),
    "quality": ("quality",),
}
"""Request field -> the names clients send it under, the first that is there wins."""

MAX_IMAGE_SCALE = 1000.0


def read_request(body: Any, *, spec: ModelSpec, image_dirs: tuple[str, ...]) -> GenerateRequest:
    """Unknown keys are ignored, null is absent, and what this model type cannot use is left undecoded.

    RequestError names the client's field, what was sent and what is allowed.
    """
    if not isinstance(body, Mapping):
        raise RequestError(f"the body must be one JSON object, not {type(body).__name__}.")
    given = {key: value for key, value in body.items() if value is not None and value != ""}
    values: dict[str, Any] = {}
    for field, names in PLAIN.items():
        name = next((name for name in names if name in given), None)
        if name is not None:
            values[field] = given[name]
    if spec.output == "image":
        values.pop("num_frames", None)
    values |= _arrays(given, spec) | _pictures(given, spec, image_dirs)
    try:
        return GenerateRequest(**values)
    except ValidationError as error:
        raise _as_request_error(error) from error


def _arrays(given: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if "latent" in given and spec.returns_latents:
        values["latents"] = codec.decode_tensor(given["latent"], field="latent")
    for name in ("sigmas", "timesteps"):
        if name in given:
            values[name] = _numbers(given, name)
    for side, prefix in (("positive", ""), ("negative", "negative_")):
        if f"{side}_embeds" in given:
            conditioning = codec.decode_conditioning(given[f"{side}_embeds"], field=f"{side}_embeds")
            values[f"{prefix}prompt_embeds"] = conditioning.embeds
            values[f"{prefix}pooled_prompt_embeds" if not prefix else "negative_pooled_prompt_embeds"] = conditioning.pooled
    return values


def _pictures(given: Mapping[str, Any], spec: ModelSpec, image_dirs: tuple[str, ...]) -> dict[str, Any]:
    if "image" not in spec.requires or "image" not in given:
        return {}
    image = codec.decode_image_or_path(given["image"], field="image", allowed_dirs=image_dirs)
    return {"image": _scaled(image, given.get("image_scale"), "image_scale")}


def _scaled(image: Image.Image, percent: Any, field: str) -> Image.Image:
    """A0 clients send a percentage, one of them as a one-element list."""
    percent = percent[0] if isinstance(percent, list) and len(percent) == 1 else percent
    if percent is None:
        return image
    if isinstance(percent, bool) or not isinstance(percent, int | float) or not 1 <= percent <= MAX_IMAGE_SCALE:
        raise RequestError(f"{field}={percent!r} is not allowed. Send a percentage from 1 to {MAX_IMAGE_SCALE:g}.", field=field)
    if percent == 100:
        return image
    size = tuple(max(1, round(side * percent / 100)) for side in image.size)
    return image.resize(size, Image.Resampling.LANCZOS)


def _numbers(given: Mapping[str, Any], name: str) -> list[float] | list[int]:
    """A JSON list, or an encoded 1-D tensor."""
    values = given[name]
    if isinstance(values, str):
        array = codec.decode_tensor(values, field=name)
        if array.ndim != 1:
            raise RequestError(f"{name} must be a list of numbers or a 1-D tensor, not of shape {array.shape}.", field=name)
        values = array.tolist()
    if not isinstance(values, list) or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise RequestError(f"{name} must be a list of numbers or an encoded 1-D tensor.", field=name)
    return [round(value) for value in values] if name == "timesteps" else [float(value) for value in values]


def _as_request_error(error: ValidationError) -> RequestError:
    """The first thing wrong, in the words of the client."""
    first = error.errors()[0]
    field = str(first["loc"][0]) if first["loc"] else ""
    name = PLAIN.get(field, (field,))[0]
    given = repr(first["input"])
    return RequestError(f"{name}={given[:80]} is not allowed: {first['msg']}.", field=name)

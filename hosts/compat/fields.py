"""The JSON of POST /generate -> GenerateRequest. Old names and encodings live only in
hosts/compat.
"""

import logging
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import ValidationError

from backends.errors import RequestError
from backends.model_table import ModelSpec
from backends.request import GenerateRequest
from hosts.compat import codec
from hosts.compat.limits import DecodeLimits
from hosts.http.limits import DEFAULT_LIMITS, MAX_IMAGES, Limits
from hosts.launch.settings import Settings

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
    "control_guidance_start": ("control_guidance_start",),
    "control_guidance_end": ("control_guidance_end",),
    "ip_adapter_scale": ("ip_adapter_scale",),
    "first_step": ("first_step",),
    "stop_step": ("stop_step",),
    "latent_space": ("latent_space",),
    "compel": ("use_compel", "compel"),
    "warmup_steps": ("warmup_steps",),
    "quality": ("quality",),
}
"""Request field -> the names clients send it under, the first that is there wins."""

SINGLE = ("image", "init_image", "mask_image")
"""Images of which a request has one at most."""
MAX_IMAGE_SCALE = 1000.0
_decoding = threading.BoundedSemaphore(4)
"""Requests that are decoded at the same time: an image takes 20 bytes per pixel for a moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """What this host lets requests bring, and from where.

    image_dirs, lora_dirs: folders from which they may name files. image_scale: percent for images
    that say none themselves.
    takes_control_image, takes_ip_image: whether something that uses the image is loaded.
    """

    image_dirs: tuple[str, ...] = ()
    lora_dirs: tuple[str, ...] = ()
    image_scale: float | None = None
    takes_control_image: bool = False
    takes_ip_image: bool = False
    limits: Limits = DEFAULT_LIMITS

    @classmethod
    def by(cls, settings: Settings) -> "Accepted":
        return cls(
            image_dirs=_folders(settings.image_dirs),
            lora_dirs=_folders(settings.lora_dir),
            image_scale=settings.image_scale,
            takes_control_image=bool(settings.control_net),
            takes_ip_image=bool(settings.ip_adapter),
            limits=Limits.by(settings),
        )


def _folders(text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (text or "").split(":")))


def read_request(body: Any, *, spec: ModelSpec, accepted: Accepted) -> GenerateRequest:
    """Unknown keys are ignored, null is absent, and what this host cannot use is left undecoded.

    RequestError names the client's field, what was sent and what is allowed.
    """
    with _decoding:
        return _read(body, spec=spec, accepted=accepted)


def _read(body: Any, *, spec: ModelSpec, accepted: Accepted) -> GenerateRequest:
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
    values |= _arrays(given, spec) | _images(given, spec, accepted)
    if "lora" in given:
        values["lora"] = _loras(given["lora"], accepted.lora_dirs)
    try:
        request = GenerateRequest(**values)
    except ValidationError as error:
        raise _as_request_error(error) from error
    accepted.limits.check(request)
    return request


def _arrays(given: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if "latent" in given and spec.returns_latents:
        values["latents"] = codec.decode_tensor(given["latent"], field="latent")
    for name in ("sigmas", "timesteps"):
        if name in given:
            values[name] = _numbers(given, name)
    for side, prefix in (("positive", ""), ("negative", "negative_")):
        if f"{side}_embeds" in given:
            conditioning = codec.decode_conditioning(
                given[f"{side}_embeds"], field=f"{side}_embeds"
            )
            values[f"{prefix}prompt_embeds"] = conditioning.embeds
            values[
                f"{prefix}pooled_prompt_embeds" if not prefix else "negative_pooled_prompt_embeds"
            ] = conditioning.pooled
    return values


def _images(given: Mapping[str, Any], spec: ModelSpec, accepted: Accepted) -> dict[str, Any]:
    wanted = {
        "image": ("image", "image" in spec.requires),
        "init_image": ("init_image", True),
        "mask_image": ("mask_image", True),
        "control_image": ("control_image", accepted.takes_control_image),
        "ip_adapter_image": ("ip_image", accepted.takes_ip_image),
    }
    decoded: dict[str, Any] = {}
    for field, (name, is_used) in wanted.items():
        # the oldest clients put the IP-Adapter's image under 'image'
        source = (
            "image"
            if name == "ip_image" and name not in given and "image" not in spec.requires
            else name
        )
        if not is_used or source not in given:
            continue
        percent = given.get(f"{name}_scale", accepted.image_scale)
        many = given[source] if isinstance(given[source], list) else [given[source]]
        if not 1 <= len(many) <= MAX_IMAGES:
            raise RequestError(
                f"{source} holds {len(many)} images. Allowed: 1 to {MAX_IMAGES}.", field=source
            )
        limits = DecodeLimits(max_pixels=accepted.limits.max_image_megapixels * 10**6)
        images = [
            codec.decode_image_or_path(
                one, field=source, allowed_dirs=accepted.image_dirs, limits=limits
            )
            for one in many
        ]
        images = [_scaled(image, percent, f"{name}_scale", limits) for image in images]
        decoded[field] = (
            images if isinstance(given[source], list) and field not in SINGLE else images[0]
        )
    return decoded


def _loras(given: Any, folders: tuple[str, ...]) -> dict[str, float]:
    """{"path": scale} with the paths inside the folders that requests may use; a relative path is
    looked up in them.
    """
    if not isinstance(given, Mapping) or not all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in given.values()
    ):
        raise RequestError(
            'lora must be an object such as {"style.safetensors": 0.8}.', field="lora"
        )
    found = {}
    for name, scale in given.items():
        candidates = [
            (Path(folder).resolve(), (Path(folder) / name).resolve()) for folder in folders
        ]
        path = next(
            (path for folder, path in candidates if path.is_relative_to(folder) and path.is_file()),
            None,
        )
        if path is None:
            where = ", ".join(folders) or "no folder: the host was started without --lora_dir"
            raise RequestError(
                f"lora={name!r} is not a file that requests may use. Allowed: files in {where}.",
                field="lora",
            )
        if not math.isfinite(scale):
            raise RequestError(
                f"lora={name!r} has scale {scale}. Send a finite number.", field="lora"
            )
        found[str(path)] = float(scale)
    return found


def _scaled(image: Image.Image, percent: Any, field: str, limits: DecodeLimits) -> Image.Image:
    """A0 clients send a percentage, one of them as a one-element list."""
    percent = percent[0] if isinstance(percent, list) and len(percent) == 1 else percent
    if percent is None:
        return image
    if (
        isinstance(percent, bool)
        or not isinstance(percent, int | float)
        or not 1 <= percent <= MAX_IMAGE_SCALE
    ):
        raise RequestError(
            f"{field}={percent!r} is not allowed. Send a percentage from 1 to {MAX_IMAGE_SCALE:g}.",
            field=field,
        )
    if percent == 100:
        return image
    size = tuple(max(1, round(side * percent / 100)) for side in image.size)
    if math.prod(size) > limits.max_pixels:
        raise RequestError(
            f"{field}={percent:g} makes an image of {size[0]}x{size[1]}, more than "
            f"{limits.max_pixels} pixels (--max_image_megapixels). "
            "Send a smaller one.",
            field=field,
        )
    return image.resize(size, Image.Resampling.LANCZOS)


def _numbers(given: Mapping[str, Any], name: str) -> list[float] | list[int]:
    """A JSON list, or an encoded 1-D tensor."""
    values = given[name]
    if isinstance(values, str):
        array = codec.decode_tensor(values, field=name)
        if array.ndim != 1:
            raise RequestError(
                f"{name} must be a list of numbers or a 1-D tensor, not of shape {array.shape}.",
                field=name,
            )
        values = array.tolist()
    if not isinstance(values, list) or not all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in values
    ):
        raise RequestError(
            f"{name} must be a list of numbers or an encoded 1-D tensor.", field=name
        )
    return (
        [round(value) for value in values]
        if name == "timesteps"
        else [float(value) for value in values]
    )


def _as_request_error(error: ValidationError) -> RequestError:
    """The first thing wrong, in the words of the client."""
    first = error.errors()[0]
    field = str(first["loc"][0]) if first["loc"] else ""
    name = PLAIN.get(field, (field,))[0]
    given = repr(first["input"])
    return RequestError(f"{name}={given[:80]} is not allowed: {first['msg']}.", field=name)

"""ControlNet arguments of one generation: resized images, scales, and the window of steps."""

from inspect import Signature
from typing import Any

from PIL import Image

from backends.errors import RequestError, UnsupportedError
from backends.model_table import ModelSpec
from backends.request import GenerateRequest, LoadRequest

_WINDOW = {"control_guidance_start": 0.0, "control_guidance_end": 1.0}


def require_control(
    request: GenerateRequest, load: LoadRequest, spec: ModelSpec, signature: Signature
) -> None:
    """Raise RequestError or UnsupportedError if the request does not fit the loaded ControlNets."""
    if not load.control_net:
        return
    number = len(load.control_net)
    if request.control_image is None:
        raise RequestError(
            "control_image is missing, but a ControlNet is loaded. Send a control image.",
            field="control_image",
        )
    images = _listed(request.control_image)
    if len(images) not in (1, number):
        raise RequestError(
            f"{len(images)} control images were sent for {number} ControlNets. Send one for all, "
            "or one for each.",
            field="control_image",
        )
    scales = _listed(request.controlnet_conditioning_scale)
    if len(scales) > number:
        raise RequestError(
            f"{len(scales)} scales were sent for {number} ControlNets. Send at most {number}.",
            field="controlnet_scale",
        )
    for name, default in _WINDOW.items():
        if getattr(request, name) != default and name not in signature.parameters:
            raise UnsupportedError(
                f"{name} is not available for {spec.title}: diffusers' "
                f"{spec.controlnet['pipeline']} applies its ControlNet at every step. Leave it out."
            )
    if request.control_guidance_start >= request.control_guidance_end:
        raise RequestError(
            f"control_guidance_start={request.control_guidance_start} is not before "
            f"control_guidance_end={request.control_guidance_end}. Send 0 <= start < end <= 1.",
            field="control_guidance_start",
        )


def control_arguments(
    request: GenerateRequest, load: LoadRequest, spec: ModelSpec
) -> dict[str, Any]:
    """Return the pipeline call's arguments for a resolved request that passed require_control."""
    if not load.control_net:
        return {}
    number = len(load.control_net)
    size = (request.width, request.height)
    images = [
        image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        for image in _listed(request.control_image)
    ]
    images = images * number if len(images) == 1 else images
    if spec.output == "video":
        images = [[image] * request.num_frames for image in images]
    scales = _listed(request.controlnet_conditioning_scale)
    scales = (
        scales * number
        if len(scales) == 1
        else [*scales, *list(load.control_net.values())[len(scales) :]]
    )
    single = number == 1
    return {
        spec.controlnet["image"]: images[0] if single else images,
        "controlnet_conditioning_scale": float(scales[0])
        if single
        else [float(scale) for scale in scales],
        "control_guidance_start": request.control_guidance_start,
        "control_guidance_end": request.control_guidance_end,
    }


def _listed(value: Any) -> list[Any]:
    """Return None as [], and a single value as [value]."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]

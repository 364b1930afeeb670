"""ControlNet arguments of one generation: resized images, scales, and the window of steps."""

from typing import Any

from PIL import Image

from backends.model_table import ModelSpec
from backends.request import GenerateRequest, LoadRequest, listed

_WINDOW = {"control_guidance_start": 0.0, "control_guidance_end": 1.0}


def control_arguments(
    request: GenerateRequest, load: LoadRequest, spec: ModelSpec
) -> dict[str, Any]:
    """Return the pipeline call's arguments for a resolved request."""
    if not load.control_net:
        return {}
    number = len(load.control_net)
    size = (request.width, request.height)
    images = [
        image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        for image in listed(request.control_image)
    ]
    images = images * number if len(images) == 1 else images
    if spec.output == "video":
        images = [[image] * request.num_frames for image in images]
    scales = listed(request.controlnet_conditioning_scale)
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

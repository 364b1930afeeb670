"""GenerateRequest -> keyword arguments of one diffusers pipeline call.

Nothing here is specific to a model type: an argument is passed if the call's signature has it, and
the model table supplies the defaults.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Signature
from typing import Any

import numpy as np
import torch

from backends.errors import RequestError
from backends.model_table import ModelSpec
from backends.request import CALL_DEFAULTS, GenerateRequest

logger = logging.getLogger(__name__)

_PROMPT_INPUTS = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)


def resolve(
    request: GenerateRequest, spec: ModelSpec, *, defaults: Mapping[str, Any], vae_scale_factor: int
) -> GenerateRequest:
    """Return the request with every default filled in and its size fixed.

    defaults: height, width, num_inference_steps and guidance_scale given at launch; they override
    the model table's. RequestError for a size that cannot be.
    """
    height, width = _size(request, spec, defaults, vae_scale_factor)
    filled = {
        "height": height,
        "width": width,
        "num_inference_steps": _num_inference_steps(request, spec, defaults),
        "guidance_scale": _first(
            request.guidance_scale, defaults.get("guidance_scale"), spec.guidance_scale
        ),
        **_film(request, spec),
        "clip_skip": request.clip_skip or None,
        "prompt": request.prompt or None,
        "negative_prompt": request.negative_prompt or None,
    }
    return request.model_copy(update=filled)


def call_arguments(
    request: GenerateRequest,
    spec: ModelSpec,
    signature: Signature,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Return the call's arguments for a resolved request, but for latents and the schedule."""
    arguments = {
        **_texts(request, spec, device=device, dtype=dtype),
        **_guidance(request, spec),
        "height": request.height,
        "width": request.width,
        "num_inference_steps": request.num_inference_steps,
        "clip_skip": request.clip_skip,
        "image": request.image,
        "max_area": request.height * request.width,  # else some scale the size to their own
        "num_frames": request.num_frames,
        "fps": request.fps,
        **{
            name: _first(getattr(request, name), default) for name, default in CALL_DEFAULTS.items()
        },
        "generator": generator(request),
        **spec.call,
    }
    return {
        name: value
        for name, value in arguments.items()
        if name in signature.parameters and value is not None
    }


def own_arguments(
    requests: Sequence[GenerateRequest], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments that differ between the requests of one batch, as lists.

    arguments: those of the first request.
    """
    own = {
        "prompt": [request.prompt for request in requests],
        "generator": [generator(request) for request in requests],
    }
    if "negative_prompt" in arguments:
        own["negative_prompt"] = [
            request.negative_prompt or arguments["negative_prompt"] for request in requests
        ]
    return own


def generator(request: GenerateRequest) -> torch.Generator:
    """Return a CPU generator for the request's seed: the same noise on every device and rank."""
    return torch.Generator("cpu").manual_seed(request.seed)


@contextmanager
def visible_clip_layers(pipe: Any, request: GenerateRequest) -> Iterator[None]:
    """Let diffusers 0.42 find the layers of a flat CLIPTextModel for clip_skip.

    transformers >= 5.6 dropped `.text_model`. Set only during the call, because LoRA loading tests
    whether the attribute exists. A normal assignment would register the module as its own child.
    """
    encoder = getattr(pipe, "text_encoder", None)
    if (
        not request.clip_skip
        or encoder is None
        or hasattr(encoder, "text_model")
        or not hasattr(encoder, "final_layer_norm")
    ):
        yield
        return
    object.__setattr__(encoder, "text_model", encoder)
    try:
        yield
    finally:
        object.__delattr__(encoder, "text_model")


def _film(request: GenerateRequest, spec: ModelSpec) -> dict[str, int | None]:
    """Return length and speed of a video; None for an image."""
    if spec.output != "video":
        return {"num_frames": None, "fps": None}
    return {
        "num_frames": _first(request.num_frames, spec.num_frames),
        "fps": _first(request.fps, spec.frames_per_s),
    }


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _num_inference_steps(
    request: GenerateRequest, spec: ModelSpec, defaults: Mapping[str, Any]
) -> int:
    if request.sigmas is not None:
        return max(len(request.sigmas) - 1, 1)
    if request.timesteps is not None:
        return max(len(request.timesteps), 1)
    return _first(
        request.num_inference_steps, defaults.get("num_inference_steps"), spec.num_inference_steps
    )


def _size(
    request: GenerateRequest, spec: ModelSpec, defaults: Mapping[str, Any], vae_scale_factor: int
) -> tuple[int, int]:
    if spec.upscale > 1 and request.image is not None:
        return request.image.height * spec.upscale, request.image.width * spec.upscale
    if request.latents is not None and request.latents.ndim == 4:
        height, width = (side * vae_scale_factor for side in request.latents.shape[-2:])
        if (request.height, request.width) not in ((None, None), (height, width)):
            logger.info(
                "the requested size %sx%s is ignored: the latents are for %dx%d",
                request.width,
                request.height,
                width,
                height,
            )
    elif request.init_image is not None and request.height is None and request.width is None:
        width, height = request.init_image.size
    else:
        height = _first(request.height, defaults.get("height"), spec.height)
        width = _first(request.width, defaults.get("width"), spec.width)
    rounded = [side // spec.size_multiple * spec.size_multiple for side in (height, width)]
    if min(rounded) == 0 or (request.latents is not None and rounded != [height, width]):
        raise RequestError(
            f"size {width}x{height} is not allowed for {spec.title}. Both sides must be multiples "
            f"of {spec.size_multiple} pixels.",
            field="width" if rounded[0] == height else "height",
        )
    if rounded != [height, width]:
        logger.info(
            "size %dx%d reduced to %dx%d: both sides must be multiples of %d",
            width,
            height,
            rounded[1],
            rounded[0],
            spec.size_multiple,
        )
    return rounded[0], rounded[1]


def _guidance(request: GenerateRequest, spec: ModelSpec) -> dict[str, Any]:
    scale = request.guidance_scale
    if not math.isfinite(scale):
        raise RequestError(f"cfg={scale} is not a number. Send one from 0 to 1000.", field="cfg")
    if spec.guidance == "frame_ramp":
        first = scale if request.num_frames == 1 else min(1.0, scale)  # of a ramp with one frame
        return {"min_guidance_scale": first, "max_guidance_scale": scale}
    return {spec.guidance_argument: scale}


def _texts(
    request: GenerateRequest, spec: ModelSpec, *, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    negative = request.negative_prompt if spec.guidance == "cfg" else None
    if negative is None and spec.empty_negative and request.guidance_scale > 1:
        negative = spec.empty_negative
    if request.prompt_embeds is None:
        return {"prompt": request.prompt or "", "negative_prompt": negative}
    given = {
        name: getattr(request, name)
        for name in _PROMPT_INPUTS
        if getattr(request, name) is not None
    }
    if spec.guidance != "cfg":
        given = {name: value for name, value in given.items() if not name.startswith("negative")}
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(value)).to(device=device, dtype=dtype)
        for name, value in given.items()
    }
    if spec.input_layout == "list":
        return {
            **{name: list(tensor) for name, tensor in tensors.items()},
            "negative_prompt": negative,
        }
    if "negative_prompt_embeds" in tensors:
        tensors["prompt_embeds"], tensors["negative_prompt_embeds"] = _same_length(
            tensors["prompt_embeds"], tensors["negative_prompt_embeds"]
        )
        negative = None
    return {**tensors, "negative_prompt": negative}


def _same_length(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad the shorter of two (1, T, D) tensors with zeros at its end."""
    length = max(a.shape[1], b.shape[1])
    return tuple(torch.nn.functional.pad(x, (0, 0, 0, length - x.shape[1])) for x in (a, b))


def require_clip_layers(request: GenerateRequest, pipe: Any, signature: Signature) -> None:
    """Raise RequestError if clip_skip leaves no layer of a CLIP text encoder."""
    if not request.clip_skip or "clip_skip" not in signature.parameters:
        return
    encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
    most = (
        min(
            (encoder.config.num_hidden_layers for encoder in encoders if encoder is not None),
            default=1,
        )
        - 1
    )
    if request.clip_skip > most:
        raise RequestError(
            f"clip_skip={request.clip_skip} is not allowed: the text encoder allows 0 to {most}. "
            "Send a value in that range.",
            field="clip_skip",
        )

"""IP-Adapters, images as prompts: loading them, and their arguments of one generation."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from backends.errors import ConfigError
from backends.files.adapter_fit import find_encoder
from backends.loading.model_files import read_weights
from backends.loading.weights import DTYPES, LOADING_ERRORS
from backends.model_table import ModelSpec
from backends.request import GenerateRequest, LoadRequest

_PARTS = {
    "image_proj": "image_proj",
    "ip_adapter_proj_model": "image_proj",
    "ip_adapter": "ip_adapter",
    "double_blocks": "ip_adapter",
}
_RENAMED = {
    "processor.": "",
    "ip_adapter_double_stream_k_proj": "to_k_ip",
    "ip_adapter_double_stream_v_proj": "to_v_ip",
}
"""XLabs' names -> diffusers'."""


def load_ip_adapters(pipe: Any, spec: ModelSpec, load: LoadRequest) -> None:
    """Load all IP-Adapters of the load request and one image encoder. ConfigError if one fails."""
    if not load.ip_adapter:
        return
    paths = [Path(path) for path in load.ip_adapter]
    if getattr(pipe, "image_encoder", None) is None:
        _load_encoder(pipe, spec, load, paths[0])
    parts = [_parts(path) for path in paths]
    places: dict[str, Any] = {"weight_name": [""] * len(paths), "subfolder": [""] * len(paths)}
    encoder = next(
        name
        for name in inspect.signature(pipe.load_ip_adapter).parameters
        if name.startswith("image_encoder")
    )
    try:
        with _castable(getattr(pipe, spec.denoiser)):
            pipe.load_ip_adapter(parts if len(parts) > 1 else parts[0], **places, **{encoder: None})
    except LOADING_ERRORS as error:
        raise ConfigError(
            f"ip_adapter={paths[0]} does not fit {spec.title}: {error}. Give one made for this "
            "model type."
        ) from error


@contextmanager
def _castable(denoiser: Any) -> Iterator[None]:
    """Let diffusers cast a GGUF denoiser, as its new layers need: packed weights are integers,
    which a cast leaves alone.
    """
    is_quantized = getattr(denoiser, "is_quantized", False)
    if is_quantized:
        denoiser.is_quantized = False
    try:
        yield
    finally:
        if is_quantized:
            denoiser.is_quantized = True


def use_scales(pipe: Any, load: LoadRequest, request: GenerateRequest) -> None:
    """Set the request's scale for this generation, else the scales given at launch."""
    if not load.ip_adapter:
        return
    asked = request.ip_adapter_scale
    scales = [float(scale) if asked is None else float(asked) for scale in load.ip_adapter.values()]
    pipe.set_ip_adapter_scale(scales if len(scales) > 1 else scales[0])


def image_arguments(request: GenerateRequest, load: LoadRequest) -> dict[str, Any]:
    """Return the pipeline call's arguments. Several images are combined in every adapter."""
    if not load.ip_adapter:
        return {}
    image = request.ip_adapter_image
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if len(load.ip_adapter) > 1 or isinstance(image, list):
        return {"ip_adapter_image": [image] * len(load.ip_adapter)}
    return {"ip_adapter_image": image}


def _parts(path: Path) -> dict[str, Mapping[str, Tensor]]:
    """Return the file's tensors as diffusers takes them: image projection and attention layers."""
    weights = read_weights(path, option="ip_adapter")
    if all(isinstance(part, Mapping) for part in weights.values()):  # a .bin holds two dictionaries
        return {
            "image_proj": weights.get("image_proj", {}),
            "ip_adapter": weights.get("ip_adapter", {}),
        }
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in weights.items():
        prefix, _, name = key.partition(".")
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
        if prefix in _PARTS:
            parts[_PARTS[prefix]][name] = tensor
    if not all(parts.values()):
        raise ConfigError(
            f"ip_adapter={path} holds no IP-Adapter: keys with image_proj and ip_adapter are "
            "missing. Give another file."
        )
    return parts


def _load_encoder(pipe: Any, spec: ModelSpec, load: LoadRequest, weights: Path) -> None:
    """Load the image encoder beside the weights and its processor, and register both."""
    folder = find_encoder(weights)
    options = {"local_files_only": True}
    try:
        encoder = getattr(transformers, spec.ip_adapter["image_encoder"]).from_pretrained(
            folder, dtype=DTYPES[load.variant], **options
        )
        side = encoder.config.image_size
        processor_class = getattr(transformers, spec.ip_adapter["image_processor"])
        has_config = (folder / "preprocessor_config.json").is_file()
        processor = (
            processor_class.from_pretrained(folder, **options)
            if has_config
            else processor_class(size=side, crop_size=side)
        )
    except LOADING_ERRORS as error:
        raise ConfigError(
            f"the image encoder {folder} does not load as {spec.ip_adapter['image_encoder']}: "
            f"{error}"
        ) from error
    pipe.register_modules(image_encoder=encoder.eval(), feature_extractor=processor)

"""Compare the names and shapes in weight files with an empty model. Reads no weights."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from diffusers.loaders import single_file_model
from torch import Tensor

from backends.errors import ConfigError
from backends.files.checkpoint import read_config
from backends.files.denoiser_families import DENOISER_PREFIXES
from backends.files.fit import without_scales
from backends.files.recognition import NOTES
from backends.files.weight_headers import Header, require_same_shapes
from backends.loading.plain_weights import LDM_PREFIX, LDM_UNET

TEXT_MODEL = "text_model."
"""A prefix of CLIP text encoders' names in some versions of transformers."""
CONVERSION_ERRORS = (
    KeyError,
    ValueError,
    IndexError,
    AttributeError,
    TypeError,
    RuntimeError,
    StopIteration,
)
"""Exceptions that diffusers' name conversions raise for unknown names."""


def require_weights(
    model: Any,
    config: str | Path,
    header: Header,
    *,
    given: str,
    advice: str,
    prefixes: tuple[str, ...] = (),
) -> bool:
    """Return whether the weights have diffusers' own names; False if they must be converted.

    ConfigError with the missing, unknown and wrong tensors, unless they fill the class with this
    config.json exactly. Names are converted by the loader's own function, on meta tensors.
    prefixes: see plain_weights.
    """
    settings = dict(read_config(config))
    with init_empty_weights():
        empty = model.from_config(settings)
    wanted = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    weights = _named(without_scales(header), wanted, prefixes)
    empty._fix_state_dict_keys_on_load(weights)
    own_names = weights.keys()
    if own_names != wanted.keys() and (convert := _conversion(model)) is not None:
        weights = _converted(
            convert, weights, settings, wanted, given=given, model=model, advice=advice
        )
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in weights.items()
        if name in wanted or not any(pattern.search(name) for pattern in ignored)
    }
    require_same_shapes(given, shapes, wanted, advice)
    return weights.keys() == own_names


def _named(
    header: Header, wanted: Mapping[str, Any], prefixes: tuple[str, ...]
) -> dict[str, Tensor]:
    """Return the file's tensors on the meta device, without a prefix.

    A UNet in the original names gets the prefix that diffusers expects.
    """
    if not header.shapes.keys() & wanted.keys():
        header = header.without(*prefixes)
    shapes = {name: shape for name, shape in header.shapes.items() if name not in NOTES}
    if prefixes == DENOISER_PREFIXES and any(name.startswith(LDM_UNET[0]) for name in shapes):
        shapes = {
            LDM_PREFIX + name: shape for name, shape in shapes.items() if name.startswith(LDM_UNET)
        }
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _conversion(model: Any) -> Callable[..., dict[str, Tensor]] | None:
    """Return diffusers' function from the original names to its own, for classes that have one."""
    name = single_file_model._get_single_file_loadable_mapping_class(model)
    return (
        single_file_model.SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"]
        if name is not None
        else None
    )


def _converted(
    convert: Callable[..., dict[str, Tensor]],
    weights: dict[str, Tensor],
    settings: dict[str, Any],
    wanted: Mapping[str, Any],
    *,
    given: str,
    model: Any,
    advice: str,
) -> dict[str, Tensor]:
    """Convert the original names.

    Where most names are diffusers' already and the conversion finds no more of them, leave them:
    the list of differences says more than a failed conversion. Z-Image's and LTX's original names
    are mostly diffusers' too.
    """
    own = len(weights.keys() & wanted.keys())
    are_mostly_own = own * 2 > len(wanted)
    try:
        converted = convert(config=settings, checkpoint=dict(weights))
    except CONVERSION_ERRORS as error:
        if are_mostly_own:
            return weights
        raise ConfigError(
            f"{given} does not hold the weights of a {model.__name__}: its {len(weights)} tensors "
            f"({next(iter(weights), 'none')}, ...) cannot be converted ({error}). {advice}"
        ) from error
    finds_more = len(converted.keys() & wanted.keys()) > own
    return converted if finds_more or not are_mostly_own else weights


def encoder_config(model: Any, folder: str | Path) -> Any:
    """Return the configuration of a transformers encoder.

    The one of T5Gemma is of the encoder alone or of an encoder with a decoder.
    """
    if model.__name__ != "T5GemmaEncoder":
        return model.config_class.from_pretrained(folder, local_files_only=True)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    return getattr(config, "encoder", config)


def require_encoder(model: Any, folder: Path, header: Header, *, given: str, advice: str) -> None:
    """Check a transformers encoder, in which missing layers would be initialised at random.

    Names of older versions are left to transformers, which renames them. Extra weights do no harm.
    """
    with init_empty_weights():
        empty = model(encoder_config(model, folder))
    tied = getattr(empty, "all_tied_weights_keys", None) or {}
    wanted = {
        name.removeprefix(TEXT_MODEL): tuple(tensor.shape)
        for name, tensor in empty.state_dict().items()
        if name not in tied and "pooler." not in name
    }
    shapes = {name.removeprefix(TEXT_MODEL): shape for name, shape in header.shapes.items()}
    shapes = {name: shape for name, shape in shapes.items() if name in wanted}
    if len(shapes) * 2 > len(wanted):
        require_same_shapes(given, shapes, wanted, advice)

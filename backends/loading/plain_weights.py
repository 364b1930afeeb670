"""Convert weights to what diffusers loads: no 8-bit scales or prefixes, original GGUF shapes."""

import math
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from backends.errors import ConfigError
from backends.files.denoiser_families import DENOISER_PREFIXES
from backends.files.fit import MARKER, SCALES, UNKNOWN_SCALES, has_scales, refuse_unknown_scales
from backends.files.recognition import NOTES
from backends.files.weight_headers import Header, Shape, original_shapes
from backends.loading.conversion import SCALE, default_dtype, is_finite

Weights = dict[str, Tensor]
SCALE_ENDINGS = ((".scale_weight", ".weight"), (".weight_scale", ".weight"))
"""Suffix of a scale's name -> suffix of its weight's name."""
LDM_UNET = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
LDM_PREFIX = "model.diffusion_model."


def is_plain(header: Header) -> bool:
    """Return whether a file in diffusers' names can be loaded unchanged."""
    is_scaled = has_scales(header)
    return (
        not is_scaled
        and not header.has(*NOTES)
        and not any(name.startswith(DENOISER_PREFIXES) for name in header.shapes)
    )


def plain_weights(
    weights: Weights, *, given: str, dtype: torch.dtype | None, prefixes: tuple[str, ...]
) -> Weights:
    """Return one model's weights without scales, notes and the prefix of their names.

    dtype: None leaves scaled weights in 8 bits, for `fill_model`. prefixes: possible prefixes of a
    denoiser or VAE. In a file with several models only the weights with the prefix are returned. A
    UNet in the original names gets the prefix that diffusers expects.
    """
    scaled = scaled_weights(weights, given=given, dtype=dtype)
    prefix = next((text for text in prefixes if any(name.startswith(text) for name in scaled)), "")
    inner = {
        name.removeprefix(prefix): tensor
        for name, tensor in scaled.items()
        if name.startswith(prefix)
    }
    inner = {name: tensor for name, tensor in inner.items() if name not in NOTES}
    if any(name.startswith(LDM_UNET[0]) for name in inner):
        return {
            LDM_PREFIX + name: tensor for name, tensor in inner.items() if name.startswith(LDM_UNET)
        }
    return inner


def scaled_weights(weights: Weights, *, given: str, dtype: torch.dtype | None) -> Weights:
    """Return the weights multiplied by their scales, or with dtype=None beside their scales.

    ConfigError for unknown kinds of scales.
    """
    if not any(name.endswith((*SCALES, *UNKNOWN_SCALES)) or name == MARKER for name in weights):
        return weights
    refuse_unknown_scales(weights, given)
    plain = {
        name: tensor
        for name, tensor in weights.items()
        if not name.endswith(SCALES) and name != MARKER
    }
    for ending, target in SCALE_ENDINGS:
        for name in [name for name in weights if name.endswith(ending)]:
            weight_name = name.removesuffix(ending) + target
            if weight_name not in plain:
                raise ConfigError(
                    f"{given} has the scale {name}, but no {weight_name}. The file is incomplete: "
                    "download it again."
                )
            scale = _factors(weight_name, plain[weight_name], weights[name], given=given)
            if dtype is not None:
                plain[weight_name] = (plain[weight_name].float() * scale).to(dtype)
            else:
                setattr(plain[weight_name], SCALE, scale)
    return plain


def _factors(name: str, weight: Tensor, scale: Tensor, *, given: str) -> Tensor:
    """Return one scale, or one per row, in float32 and in a shape that multiplies the weight."""
    is_for_rows = scale.numel() == weight.shape[0]
    if (scale.numel() != 1 and not is_for_rows) or weight.dtype == torch.uint8:
        raise ConfigError(
            f"{given} scales {name} of shape {list(weight.shape)} by blocks ({list(scale.shape)}), "
            "which is not supported. Allowed: one scale for each weight or row. Give such a file, "
            "or the original and --quantize_to."
        )
    shape = (-1, *(1,) * (weight.ndim - 1)) if is_for_rows else ()
    return scale.float().reshape(shape)


def fill_model(model: Any, config: Path, weights: Weights, dtype: torch.dtype) -> nn.Module:
    """Return a diffusers model that holds these tensors as they are, without a copy.

    The names must fill the class exactly (require_weights). dtype: of buffers that no file holds.
    """
    with init_empty_weights(include_buffers=False), default_dtype(dtype):
        filled = model.from_config(model.load_config(config))
    filled._fix_state_dict_keys_on_load(weights)
    for name, tensor in weights.items():
        path, _, attribute = name.rpartition(".")
        part = filled.get_submodule(path)
        if attribute in part._buffers:
            part._buffers[attribute] = tensor
        elif attribute in part._parameters:
            part._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
            setattr(part._parameters[attribute], SCALE, getattr(tensor, SCALE, None))
    return filled.eval()


def read_gguf(path: str) -> Weights:
    """Return a GGUF file's tensors as diffusers reads them, stored rows of 256 reshaped.

    They are pages of the file, as with safetensors: diffusers' own reader copies all of them.
    """
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES, GGUFParameter
    from gguf import GGMLQuantizationType, GGUFReader

    plain = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
    reader, weights = GGUFReader(path, "c"), {}  # c: torch wants pages that it might write
    for entry in reader.tensors:
        kind = entry.tensor_type
        if kind not in (*plain, *SUPPORTED_GGUF_QUANT_TYPES):
            raise ValueError(f"{entry.name} is stored as {kind.name}, which diffusers cannot read")
        tensor = torch.from_numpy(entry.data)
        weights[entry.name] = tensor if kind in plain else GGUFParameter(tensor, quant_type=kind)
    for name, shape in original_shapes(reader).items():
        if name in weights:
            weights[name] = _reshaped(weights[name], shape)
    return weights


def _reshaped(tensor: Tensor, shape: Shape) -> Tensor:
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    plain = dequantize_gguf_tensor(tensor)
    return plain.reshape(shape) if plain.numel() == math.prod(shape) else tensor


def unpacked(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of `read_gguf` in this dtype."""
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor

    is_packed = isinstance(tensor, GGUFParameter)
    return (dequantize_gguf_tensor(tensor) if is_packed else tensor).to(dtype)


def unpack_beside_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Unpack GGUF weights in all layers that cannot compute with them: all but nn.Linear."""
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, GGUFParameter) and not isinstance(module, GGUFLinear):
                plain = unpacked(parameter, dtype)
                module.register_parameter(name, nn.Parameter(plain, requires_grad=False))


def require_finite(model: nn.Module, given: str, dtype: torch.dtype) -> None:
    """Raise ConfigError for weights that are NaN or infinite: every image would be black.

    dtype: in which they will be used.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not is_finite(parameter, dtype):
            raise ConfigError(
                f"{given} holds weights that are not finite ({name}): every image would be black. "
                "The file is damaged, or was saved at too low a precision: give another one."
            )

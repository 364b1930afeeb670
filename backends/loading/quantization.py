"""Quantise the weights of a loaded pipeline, component by component."""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from backends.errors import ConfigError
from backends.loading.conversion import convert_layer, float32_parts
from backends.loading.packed_weights import pack_layer
from backends.loading.weights import DTYPES, vae_dtype
from backends.model_table import ModelSpec
from backends.parallel.gathered_weights import blocks_of
from backends.parallel.weight_shards import TRIM_EVERY_BYTES, is_placeholder, release_memory
from backends.quantization_spec import EVERYWHERE, QuantizationSpec
from backends.request import LoadRequest

logger = logging.getLogger(__name__)

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
MOTION = "motion_modules"
POOLING = "time_extra_emb.pooler"
"""Attention pooling uses its layers' weights without calling the layers. bitsandbytes needs the
calls.
"""


def quantize(
    pipe: Any,
    spec: ModelSpec,
    load: LoadRequest,
    *,
    device: torch.device,
    divide_block: Callable[[nn.Module, nn.Module], None],
) -> dict[str, int]:
    """Quantise the requested components. Return component -> bytes saved.

    divide_block: called with a component and each of its blocks whose layers are quantised, so that
    a rank that keeps a share of them never holds all.
    ConfigError if this machine cannot run the kind; it lists those that run everywhere.
    """
    saved = {}
    for group, choice in load.quantize.items():
        for name, module, only in _targets(pipe, spec, group):
            component = module if name != MOTION else getattr(pipe, spec.denoiser)
            dtype = vae_dtype(spec, load) if name == "vae" else DTYPES[load.variant]
            before = weight_bytes(module, dtype)
            keeps = float32_parts(component, dtype)
            layers = [
                (path, layer)
                for path, layer in module.named_modules()
                if isinstance(layer, LAYERS)
                and (MOTION in path) in only
                and not is_placeholder(layer.weight)
            ]
            if not layers:
                continue
            taken, last = 0, None
            blocks = {id(part): block for block in blocks_of(component) for part in block.modules()}
            for path, layer in layers:
                block = blocks.get(id(layer))
                if last is not None and block is not last:
                    divide_block(component, last)
                last = block
                taken += convert_layer(layer, path, dtype, keeps)
                if choice.kind in EVERYWHERE:
                    taken += weight_bytes(layer)
                    pack_layer(layer, choice.kind)
                else:
                    _to_bitsandbytes(module, path, layer, choice, device=device, dtype=dtype)
                if taken > TRIM_EVERY_BYTES:
                    taken = release_memory()
            saved[name] = saved.get(name, 0) + before - weight_bytes(module, dtype)
            logger.info(
                "quantised %s to %s: %.1f MB instead of %.1f",
                name,
                choice.kind,
                weight_bytes(module, dtype) / 1e6,
                before / 1e6,
            )
    return saved


def weight_bytes(module: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of all parameters and buffers as stored, or with floats in `dtype`."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(
        tensor.numel()
        * (dtype.itemsize if dtype and tensor.is_floating_point() else tensor.element_size())
        for tensor in tensors.values()
    )


def _targets(
    pipe: Any, spec: ModelSpec, group: str
) -> Iterator[tuple[str, nn.Module, tuple[bool, ...]]]:
    """Yield (component, module, layers to quantise).

    Layers: (False,) all but motion modules, (True,) only these, (False, True) all.
    """
    everything = (False, True)
    wanted = {
        "vae": ("vae",),
        "misc": ("controlnet",),
        "encoders": ("text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder"),
    }
    for name, module in pipe.components.items():
        if not isinstance(module, nn.Module):
            continue
        if group == "denoiser" and name == spec.denoiser:
            yield name, module, (False,)
        elif group == "misc" and name == spec.denoiser:
            yield MOTION, module, (True,)
        elif name in wanted.get(group, ()):
            yield name, module, everything


def _to_bitsandbytes(
    module: nn.Module,
    path: str,
    layer: nn.Module,
    choice: QuantizationSpec,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Replace a linear layer by bitsandbytes' own, moved to the device, where it is packed.

    bitsandbytes has no convolutions.
    """
    advice = f"These run everywhere: {', '.join(EVERYWHERE)}."
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            f"quantising to {choice.kind} needs the package bitsandbytes, which is not installed. "
            f"{advice}"
        ) from error
    if not isinstance(layer, nn.Linear) or path.startswith(POOLING):
        return
    replaced = _bitsandbytes_layer(bitsandbytes, layer, choice, dtype).to(device)
    parent, _, attribute = path.rpartition(".")
    setattr(module.get_submodule(parent), attribute, replaced)
    try:
        replaced(torch.zeros(1, layer.in_features, dtype=dtype, device=device))
    except Exception as error:  # its kernels fail with asserts, shape errors, missing symbols
        raise ConfigError(
            f"quantising to {choice.kind} does not run on this machine's {device.type} for a "
            f"layer of {layer.in_features} inputs ({' '.join(str(error).split())[:120]}). "
            f"{advice}"
        ) from error


def _bitsandbytes_layer(
    bitsandbytes: Any, layer: nn.Linear, choice: QuantizationSpec, dtype: torch.dtype
) -> nn.Module:
    sizes: Mapping[str, Any] = {"bias": layer.bias is not None}
    if choice.kind == "bnb_int8":
        new = bitsandbytes.nn.Linear8bitLt(
            layer.in_features, layer.out_features, has_fp16_weights=False, **sizes
        )
        new.weight = bitsandbytes.nn.Int8Params(
            layer.weight.data, requires_grad=False, has_fp16_weights=False
        )
    else:
        compute = DTYPES[choice.compute] if choice.compute else dtype
        new = bitsandbytes.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            compute_dtype=compute,
            quant_type=choice.qtype,
            **sizes,
        )
        new.weight = bitsandbytes.nn.Params4bit(
            layer.weight.data, requires_grad=False, quant_type=choice.qtype
        )
    new.bias = layer.bias
    return new

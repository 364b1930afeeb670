"""Estimates the work of a step from a model's configuration alone, without loading it. No torch.

For `--check` and simulations. Bytes follow from shapes and are close. Seconds are operations over
an assumed speed; only their ratio to communication matters.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from backends.autotune.cost import Link, Work
from backends.errors import ConfigError
from backends.model_table import ModelSpec

ELEMENT_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
TEXT_TOKENS = 256
PIXELS_PER_TOKEN = 16
"""Side in pixels of one transformer token: 8 from the VAE times 2 from the patch size."""
UNET_REUSE = 10
"""Latent pixels per use of one UNet weight. Most weights are at low resolutions (SD1 8.8, SDXL 14).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Assumed speed of a kind of device and of the link between two, without measurements."""

    operations_per_s: float
    link: Link


DEVICES = {
    "cpu": Device(operations_per_s=5e10, link=Link(latency_s=3e-4, bytes_per_s=1e9, hides=0.5)),
    "gpu": Device(operations_per_s=1.5e14, link=Link(latency_s=3e-5, bytes_per_s=2e10, hides=0.9)),
}
"""One CPU thread with gloo; a data-centre GPU in half precision with NCCL over PCIe."""


def estimate_checkpoint(
    spec: ModelSpec,
    checkpoint: Path,
    *,
    folder: Path | None = None,
    height: int,
    width: int,
    variant: str,
    halves: int,
    device: Device,
) -> Work:
    """Return the estimated work of a step for a checkpoint.

    checkpoint: a folder in diffusers layout, or a single file. folder: the configuration of
    a single file. Missing facts
    are assumed to be small.
    """
    folder = folder or checkpoint
    config_file = folder / spec.denoiser / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    parts = (
        {part.name: count_weights(part) for part in folder.iterdir() if part.is_dir()}
        if folder.is_dir()
        else {}
    )
    num_weights = parts.pop(spec.denoiser, 0) or (
        checkpoint.stat().st_size // 2 if checkpoint.is_file() else 0
    )
    is_video = spec.denoiser == "transformer"
    try:
        return estimate_config(
            config,
            num_weights=num_weights,
            other_weights=sum(parts.values()),
            encoder_weights=sum(
                count for name, count in parts.items() if name.startswith("text_encoder")
            ),
            height=height,
            width=width,
            num_frames=(spec.num_frames - 1) // 4 + 1 if is_video else spec.num_frames,
            halves=halves,
            element_bytes=ELEMENT_BYTES[variant],
            device=device,
        )
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise ConfigError(
            f"{config_file} describes no {spec.denoiser} of {spec.title} ({error}). Download it "
            "again."
        ) from error


def estimate_config(
    config: Mapping[str, Any],
    *,
    num_weights: int,
    other_weights: int,
    height: int,
    width: int,
    halves: int,
    element_bytes: int,
    device: Device,
    num_frames: int = 1,
    encoder_weights: int = 0,
) -> Work:
    """Return the estimated work of a step.

    config: the denoiser's configuration. height, width: pixels of the image.
    """
    batch_bytes = halves * num_frames * element_bytes
    pixels = (height // 8) * (width // 8)
    shape = (
        _unet(config, height // 8, width // 8)
        if "block_out_channels" in config
        else _transformer(config, height, width)
    )
    operations = shape.pop("operations_per_weight") * 2 * num_weights * halves * num_frames
    return Work(
        step_s=max(operations, 1.0) / device.operations_per_s,
        halves=halves,
        weight_bytes=num_weights * element_bytes,
        other_bytes=other_weights * element_bytes,
        encoder_bytes=encoder_weights * element_bytes,
        activation_bytes=round(
            (shape.get("skip_bytes", 0) + 6 * shape["hidden_bytes"]) * batch_bytes
        ),
        latent_bytes=pixels * int(config.get("in_channels") or 4) * batch_bytes,
        **{
            name: round(value * batch_bytes) if name.endswith("_bytes") else int(value)
            for name, value in shape.items()
        },
    )


def count_weights(folder: Path) -> int:
    """Return the number of weights in a component's safetensors files.

    Of several precisions only the plain files count.
    """
    files = sorted(folder.glob("*.safetensors"))
    plain = [file for file in files if not {".fp16", ".bf16"} & set(file.suffixes)]
    return sum(_numbers_in(file) for file in plain or files)


def _numbers_in(file: Path) -> int:
    """Return the weights listed in the header (8 bytes of length, then JSON); 0 without one."""
    try:
        with file.open("rb") as opened:
            header = json.loads(opened.read(struct.unpack("<Q", opened.read(8))[0]))
    except (OSError, ValueError, struct.error, MemoryError, OverflowError):
        return 0
    return sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _transformer(config: Mapping[str, Any], height: int, width: int) -> dict[str, float]:
    """Return the facts of a transformer, in elements instead of bytes."""
    heads = config.get("num_attention_heads") or config.get("n_heads") or 16
    hidden = config.get("dim") or heads * (config.get("attention_head_dim") or 64)
    layers = (config.get("num_layers") or config.get("n_layers") or 24) + (
        config.get("num_single_layers") or 0
    )
    tokens = (height // PIXELS_PER_TOKEN) * (width // PIXELS_PER_TOKEN) + TEXT_TOKENS
    return {
        "kv_bytes": 2 * layers * tokens * hidden,
        "hidden_bytes": tokens * hidden,
        "num_attentions": layers,
        "operations_per_weight": tokens,
    }


def _unet(config: Mapping[str, Any], rows: int, columns: int) -> dict[str, float]:
    """Return the facts of a UNet, in elements instead of bytes.

    Each level has resnets on the way down and up, with attention if the block's name says so.
    """
    channels = list(config["block_out_channels"])
    layers = config.get("layers_per_block", 2)
    depth = config.get("transformer_layers_per_block", 1)
    kinds = config.get("down_block_types") or ["CrossAttnDownBlock2D"] * len(channels)
    found = dict.fromkeys(("kv_bytes", "hidden_bytes", "skip_bytes", "halo_bytes"), 0.0)
    counts = dict.fromkeys(("num_attentions", "num_convolutions", "num_norms"), 0)
    for level, width_of_level in enumerate(channels):
        across = max(1, columns >> level)
        size = max(1, rows >> level) * across * width_of_level
        resnets = 2 * _at(layers, level) + 1 + (2 if level == len(channels) - 1 else 0)
        attentions = resnets * _at(depth, level) if "Attn" in kinds[level] else 0
        found["kv_bytes"] += 2 * attentions * size
        found["hidden_bytes"] = max(found["hidden_bytes"], size)
        found["skip_bytes"] += (_at(layers, level) + 1) * size
        found["halo_bytes"] += 2 * (2 * resnets + 1) * across * width_of_level
        counts["num_attentions"] += attentions
        counts["num_convolutions"] += 2 * resnets + 1
        counts["num_norms"] += 2 * resnets + (resnets if attentions else 0)
    return {**found, **counts, "operations_per_weight": rows * columns / UNET_REUSE}


def _at(value: Any, level: int) -> int:
    """Return a setting at one level: configurations give one number, or one per level."""
    return int(value[level] if isinstance(value, list | tuple) else value)

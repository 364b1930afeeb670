"""LoRA files for the tiny checkpoints, strong enough to be seen. Made from the weights on disk
alone: no model is loaded.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tests.checkpoints.cache import cached
from tests.checkpoints.factory import checkpoint

if TYPE_CHECKING:
    from torch import Tensor

PROJECTION = re.compile(
    r"\.(to_[qkv]|to_out\.0|to_query|to_key|to_value)\.weight$"
)  # what LoRAs of diffusion models are usually trained on
TEXT_LAYER = re.compile(r"\.([qkv]_proj|out_proj|fc[12])\.weight$")
KOHYA_NAMES = ("ad", "sd1", "sd2", "sdup", "sdxl", "flux")
STRENGTH = 0.5  # the update is then about as large as the weights

Factors = dict[str, tuple["Tensor", "Tensor"]]


def lora(
    name: str,
    *,
    style: Literal["diffusers", "kohya", "dora"] = "diffusers",
    seed: int = 0,
    rank: int = 4,
) -> Path:
    """Return a .safetensors file with a LoRA on every attention projection of checkpoint(name),
    motion modules apart.

    "diffusers": keys as peft names them, for all types (hy, pixa, pixs and svd have no loader for
    it in diffusers itself). "dora": the same with a magnitude for each row (dora_scale), which
    diffusers' own loaders leave out. "kohya": keys as the common training scripts write them, with
    alpha = rank / 2, for KOHYA_NAMES. Includes the text encoders, except on flux, where it covers
    the double blocks (diffusers converts single blocks at the published width only).
    """
    if style not in ("diffusers", "kohya", "dora"):
        raise ValueError(f"style={style!r} is not a LoRA layout. Allowed: diffusers, kohya, dora.")
    if style == "kohya" and name not in KOHYA_NAMES:
        raise ValueError(
            f"There is no kohya layout for type {name!r}. Allowed: {', '.join(KOHYA_NAMES)}."
        )

    def build(folder: Path) -> None:
        from safetensors.torch import save_file

        tensors = (
            _kohya(name, seed, rank)
            if style == "kohya"
            else _diffusers(name, seed, rank, has_magnitudes=style == "dora")
        )
        save_file(tensors, folder / "lora.safetensors")

    return (
        cached(f"{name}-lora", {"style": style, "seed": seed, "rank": rank}, build)
        / "lora.safetensors"
    )


def factors(weights: dict[str, "Tensor"], *, seed: int, rank: int) -> Factors:
    """Return down (rank, in) and up (out, rank) for every weight (out, in)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    made = {}
    for layer, weight in sorted(weights.items()):
        num_out, num_in = weight.shape[:2]
        down = torch.randn(rank, num_in, generator=generator) / num_in**0.5
        made[layer] = down, STRENGTH * torch.randn(num_out, rank, generator=generator)
    return made


def _diffusers(name: str, seed: int, rank: int, *, has_magnitudes: bool) -> dict[str, "Tensor"]:
    part, weights = _denoiser(name)
    tensors = {}
    for layer, (down, up) in factors(weights, seed=seed, rank=rank).items():
        tensors[f"{part}.{layer}.lora_A.weight"] = down
        tensors[f"{part}.{layer}.lora_B.weight"] = up
        if has_magnitudes:
            tensors[f"{part}.{layer}.dora_scale"] = 1.3 * weights[layer].flatten(1).norm(
                dim=1, keepdim=True
            )
    return tensors


def _kohya(name: str, seed: int, rank: int) -> dict[str, "Tensor"]:
    import torch

    tensors = {}
    for prefix, weights in _kohya_flux(name) if name == "flux" else _kohya_unet(name):
        for layer, (down, up) in factors(weights, seed=seed, rank=rank).items():
            key = f"{prefix}_{layer.replace('.', '_')}"
            tensors |= {
                f"{key}.lora_down.weight": down,
                f"{key}.lora_up.weight": up,
                f"{key}.alpha": torch.tensor(rank / 2),
            }
    return tensors


def _kohya_unet(name: str) -> list[tuple[str, dict[str, "Tensor"]]]:
    """(prefix, weights) of the UNet and each text encoder."""
    _, unet = _denoiser(name)
    encoders = sorted(checkpoint(name).glob("text_encoder*/model.safetensors"))
    prefixes = ["lora_te1", "lora_te2"] if len(encoders) > 1 else ["lora_te"]
    return [
        ("lora_unet", unet),
        *((prefix, _text_layers(path)) for prefix, path in zip(prefixes, encoders, strict=True)),
    ]


def _kohya_flux(name: str) -> list[tuple[str, dict[str, "Tensor"]]]:
    """The double blocks under their original names: queries, keys and values of the image are one
    layer there.
    """
    import torch

    _, weights = _denoiser(name)
    named: dict[str, Tensor] = {}
    for layer, weight in weights.items():
        if block := re.fullmatch(r"transformer_blocks\.(\d+)\.attn\.to_q", layer):
            named[f"double_blocks.{block[1]}.img_attn.qkv"] = torch.cat([weight] * 3)
            named[f"double_blocks.{block[1]}.img_attn.proj"] = weight
    return [("lora_unet", named)]


def _denoiser(name: str) -> tuple[str, dict[str, "Tensor"]]:
    """The denoiser's folder name and its attention projections: layer name -> weight (out, in), or
    (out, in, 1, 1) for a convolution.
    """
    from safetensors.torch import load_file

    (path,) = [
        folder for folder in checkpoint(name).iterdir() if folder.name in ("unet", "transformer")
    ]
    weights = load_file(path / "diffusion_pytorch_model.safetensors")
    chosen = {
        key: weight
        for key, weight in weights.items()
        if PROJECTION.search(key) and "motion_modules" not in key
    }
    return path.name, {key.removesuffix(".weight"): weight for key, weight in chosen.items()}


def _text_layers(path: Path) -> dict[str, "Tensor"]:
    """Attention and feed-forward layers of a CLIP encoder, named with the prefix that older files
    of it have.
    """
    from safetensors.torch import load_file

    weights = {
        key.removeprefix("text_model."): weight
        for key, weight in load_file(path).items()
        if TEXT_LAYER.search(key)
    }
    return {f"text_model.{key.removesuffix('.weight')}": weight for key, weight in weights.items()}

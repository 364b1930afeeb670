"""Conversion between clients' and the denoiser's latents, and from latents to pixels.

Client space is what a VAE encodes to and decodes from: float32 (1, C, h, w), unscaled. Model space
is scaled and shifted by the VAE's configuration and, for packed layouts, folded into tokens of 2 x
2 latent pixels.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from backends.errors import RequestError, UnsupportedError
from backends.loading.offload import without_overflow
from backends.model_table import ModelSpec

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


def to_model_space(
    latents: np.ndarray, *, pipe: Any, spec: ModelSpec, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Convert a client's (1, C, h, w) latents to the pipeline's `latents` argument.

    RequestError if the channel count or the number of dims is wrong.
    """
    channels = num_channels(pipe.vae)
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise RequestError(
            f"latent has shape {latents.shape}, but {spec.title} takes (1, {channels}, height / 8, "
            "width / 8). Send latents of this model's own VAE, or leave the field out.",
            field="latent",
        )
    x = torch.from_numpy(latents[:1]).to(device=device, dtype=torch.float32)
    shift, scale = _normalisation(pipe.vae, x)
    return pack((x - shift) * scale, spec=spec).to(dtype)


def to_client_space(
    latents: Tensor, *, pipe: Any, spec: ModelSpec, height: int, width: int
) -> np.ndarray:
    """Convert model space to float32 (1, C, h, w) on the CPU, as a client's VAE decodes it."""
    x = unpack(latents.float(), pipe=pipe, spec=spec, height=height, width=width)
    return np.ascontiguousarray(unscaled(x, vae=pipe.vae).detach().cpu().numpy())


def unscaled(x: Tensor, *, vae: Any) -> Tensor:
    """Convert (B, C, h, w) from the denoiser's scale to the VAE's."""
    shift, scale = _normalisation(vae, x)
    return x / scale + shift


def from_latent_space(latents: np.ndarray, space: str, *, vae: Any) -> np.ndarray:
    """Convert a client's (B, C, h, w) in `space` ('vae' or 'model') to the VAE's scale."""
    return latents if space == "vae" else unscaled(torch.from_numpy(latents), vae=vae).numpy()


def to_latent_space(latents: np.ndarray, space: str, *, vae: Any) -> np.ndarray:
    """Convert (B, C, h, w) from the VAE's scale to `space`: the inverse of from_latent_space."""
    if space == "vae":
        return latents
    shift, scale = _normalisation(vae, torch.from_numpy(latents))
    return ((torch.from_numpy(latents) - shift) * scale).numpy()


def num_channels(vae: Any) -> int:
    """Return the VAE's latent channels. Video VAEs use another config field."""
    return vae.config.get("latent_channels") or vae.config.z_dim


def _normalisation(vae: Any, like: Tensor) -> tuple[Any, Any]:
    """Return (shift, scale) of model space = (x - shift) * scale.

    One value for all channels, one per channel, or one per channel and position in a 2 x 2 tile.
    """
    if hasattr(vae, "bn"):  # statistics of (4 C) channels, which are C x 2 x 2
        tiles = [
            stat.to(like).view(1, -1, 2, 2).repeat(1, 1, like.shape[-2] // 2, like.shape[-1] // 2)
            for stat in _moments(vae)
        ]
        return tiles[0], 1 / tiles[1]
    if "latents_mean" not in vae.config or vae.config.latents_mean is None:
        return vae.config.get("shift_factor") or 0.0, vae.config.scaling_factor
    mean, std = (
        like.new_tensor(vae.config[name]).view(1, -1, 1, 1)
        for name in ("latents_mean", "latents_std")
    )
    # a VAE with both has them one after the other, as Playground's for SDXL
    return mean, (vae.config.get("scaling_factor") or 1.0) / std


def _moments(vae: Any) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of a VAE that keeps them in a batch norm."""
    return vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()


def _counts_frames(vae: Any) -> bool:
    """Return whether the VAE takes images as videos of one frame, (B, C, 1, h, w)."""
    encoder = getattr(vae, "encoder", None)
    return encoder is not None and any(isinstance(m, nn.Conv3d) for m in encoder.modules())


def pack(x: Tensor, *, spec: ModelSpec) -> Tensor:
    """Fold (B, C, h, w) into (B, h/2 * w/2, 4 C) for packed layouts; return others unchanged."""
    if spec.latents != "packed":
        return x
    b, c, h, w = x.shape
    return (
        x.reshape(b, c, h // 2, 2, w // 2, 2)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(b, (h // 2) * (w // 2), 4 * c)
    )


def unpack(x: Tensor, *, pipe: Any, spec: ModelSpec, height: int, width: int) -> Tensor:
    """Invert pack. height and width are the image's, in pixels."""
    if spec.latents != "packed":
        return x
    h, w = height // (2 * pipe.vae_scale_factor), width // (2 * pipe.vae_scale_factor)
    b, _, d = x.shape
    return (
        x.reshape(b, h, w, d // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, d // 4, 2 * h, 2 * w)
    )


@torch.no_grad()
def decode(client_latents: np.ndarray, *, pipe: Any) -> np.ndarray:
    """Decode float32 (B, C, h, w) in client space to uint8 (B, H, W, 3)."""
    with without_overflow(pipe.vae) as vae:
        x = torch.from_numpy(client_latents).to(device=pipe._execution_device, dtype=vae.dtype)
        image = (
            vae.decode(x.unsqueeze(2), return_dict=False)[0].squeeze(2)
            if _counts_frames(vae)
            else vae.decode(x, return_dict=False)[0]
        )
        return as_result(pipe.image_processor.postprocess(image.float(), output_type="np"))


@torch.no_grad()
def encode(
    image: Image.Image,
    *,
    pipe: Any,
    height: int,
    width: int,
    hidden: Image.Image | None = None,
) -> np.ndarray:
    """Resize an image to this size in pixels and encode it, with gray where `hidden` is white.

    Returns float32 (1, C, h, w) in client space, the mode of the VAE's distribution.
    """
    pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
    with without_overflow(pipe.vae) as vae:
        x = (
            torch.from_numpy(pixels.copy())
            .permute(2, 0, 1)[None]
            .to(device=pipe._execution_device, dtype=vae.dtype)
        )
        x = x / 127.5 - 1
        if hidden is not None:
            x = x * torch.from_numpy(~_is_white(hidden, height=height, width=width)).to(x)
        return encoded(x, vae=vae).float().cpu().numpy()


def encoded(pixels: Tensor, *, vae: Any) -> Tensor:
    """Encode (B, 3, H, W) in -1..1 to (B, C, h, w): the mode of the VAE's distribution."""
    if _counts_frames(vae):
        return vae.encode(pixels.unsqueeze(2)).latent_dist.mode().squeeze(2)
    return vae.encode(pixels).latent_dist.mode()


def mask(image: Image.Image, *, pipe: Any, spec: ModelSpec, height: int, width: int) -> Tensor:
    """Resize a mask to this size in pixels and convert it to the layout of the denoiser's latents.

    float32, (1, C, h, w) before packing: 1 where latents may change, else 0. As in diffusers'
    inpainting, a latent pixel takes the value of the image pixel in its corner.
    """
    step = pipe.vae_scale_factor
    white = _is_white(image, height=height, width=width)
    small = torch.from_numpy(white[::step, ::step].astype(np.float32))
    return pack(small.expand(1, num_channels(pipe.vae), *small.shape), spec=spec)


def _is_white(mask: Image.Image, *, height: int, width: int) -> np.ndarray:
    """Resize a mask to this size in pixels. Return bool (H, W): whether it is rather white."""
    pixels = mask.convert("L").resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(pixels) >= 128


def as_result(pixels: np.ndarray) -> np.ndarray:
    """Convert float (..., 3) in [0, 1] to uint8. UnsupportedError for NaN, which would be black."""
    if not np.isfinite(pixels).all():
        raise UnsupportedError(
            "the image has values that are not numbers (NaN) and would be black: the model, a LoRA "
            "or these settings exceed what its precision can hold. Send ordinary settings (scales "
            "of LoRAs, guidance_scale, sigmas), or start the host with --variant=bf16 or fp32."
        )
    return to_uint8(pixels)


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Convert float (..., 3) in [0, 1] to uint8, rounded as in diffusers. NaN becomes black."""
    return np.nan_to_num(pixels * 255.0).round().clip(0, 255).astype(np.uint8)


@contextmanager
def beside_latents(scheduler: "SchedulerMixin", extra: Tensor | None) -> Iterator[None]:
    """Append `extra` (1, C, h, w) to what the denoiser gets as latents, in each step.

    Pipelines let their scheduler scale the latents right before the denoiser reads them, and go on
    with the unscaled ones. So the text-to-image pipeline runs such a denoiser, under every parallel
    method. None appends nothing.
    """
    if extra is None:
        yield
        return
    scale = scheduler.scale_model_input

    @functools.wraps(scale)
    def with_extra(sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scaled = scale(sample, *args, **kwargs)
        return torch.cat([scaled, extra.to(scaled).expand(len(scaled), -1, -1, -1)], dim=1)

    scheduler.scale_model_input = with_extra
    try:
        yield
    finally:
        del scheduler.scale_model_input

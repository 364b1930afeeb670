"""Between the latents that clients hold and those that a denoiser works on, and from latents to pixels.

Client space is what a VAE encodes to and decodes from: float32 (1, C, h, w), unscaled. Model space is scaled and shifted by the VAE's
configuration and, for packed layouts, folded into tokens of 2 x 2 latent pixels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from backends.errors import RequestError
from backends.model_table import ModelSpec


def to_model_space(latents: np.ndarray, *, pipe: Any, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(1, C, h, w) as a client sends them -> what the pipeline takes as `latents`. RequestError on a wrong channel count or size."""
    channels = pipe.vae.config.latent_channels
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise RequestError(
            f"latent has shape {latents.shape}, but {spec.title} works on (1, {channels}, height / 8, width / 8). "
            "Send latents of this model's own VAE, or leave the field out.",
            field="latent",
        )
    x = torch.from_numpy(latents[:1]).to(device=device, dtype=torch.float32)
    x = (x - (pipe.vae.config.get("shift_factor") or 0.0)) * pipe.vae.config.scaling_factor
    return pack(x, spec=spec).to(dtype)


def to_client_space(latents: Tensor, *, pipe: Any, spec: ModelSpec, height: int, width: int) -> np.ndarray:
    """Model space -> float32 (1, C, h, w) on the CPU, as a client's VAE decodes it."""
    x = unpack(latents.float(), pipe=pipe, spec=spec, height=height, width=width)
    x = x / pipe.vae.config.scaling_factor + (pipe.vae.config.get("shift_factor") or 0.0)
    return np.ascontiguousarray(x.detach().cpu().numpy())


def pack(x: Tensor, *, spec: ModelSpec) -> Tensor:
    """(B, C, h, w) -> (B, h/2 * w/2, 4 C) for packed layouts; else unchanged."""
    if spec.latents != "packed":
        return x
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack(x: Tensor, *, pipe: Any, spec: ModelSpec, height: int, width: int) -> Tensor:
    """The inverse of pack; height and width are those of the picture in pixels."""
    if spec.latents != "packed":
        return x
    h, w = height // (2 * pipe.vae_scale_factor), width // (2 * pipe.vae_scale_factor)
    b, _, d = x.shape
    return x.reshape(b, h, w, d // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, d // 4, 2 * h, 2 * w)


@torch.no_grad()
def decode(client_latents: np.ndarray, *, pipe: Any) -> np.ndarray:
    """float32 (B, C, h, w) in client space -> uint8 (B, H, W, 3)."""
    with _without_overflow(pipe.vae) as vae:
        x = torch.from_numpy(client_latents).to(device=pipe._execution_device, dtype=vae.dtype)
        image = vae.decode(x, return_dict=False)[0]
        return to_uint8(pipe.image_processor.postprocess(image.float(), output_type="np"))


@torch.no_grad()
def encode(image: Image.Image, *, pipe: Any, height: int, width: int) -> np.ndarray:
    """A picture, scaled to this size in pixels -> float32 (1, C, h, w) in client space: the middle of what the VAE sees in it."""
    pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
    with _without_overflow(pipe.vae) as vae:
        x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(device=pipe._execution_device, dtype=vae.dtype)
        return vae.encode(x / 127.5 - 1).latent_dist.mode().float().cpu().numpy()


@contextmanager
def _without_overflow(vae: Any) -> Iterator[Any]:
    """A VAE that overflows in float16 (SDXL's) works in float32 meanwhile, as in diffusers."""
    dtype = vae.dtype
    needs_upcast = dtype == torch.float16 and vae.config.get("force_upcast", False)
    if needs_upcast:
        vae.to(torch.float32)
    try:
        yield vae
    finally:
        if needs_upcast:
            vae.to(dtype)


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """float (..., 3) in [0, 1] -> uint8, rounded as diffusers does for PIL images. Not-a-number becomes black."""
    return np.nan_to_num(pixels * 255.0).round().clip(0, 255).astype(np.uint8)

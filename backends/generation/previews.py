"""Small previews during a generation: latents to RGB by one matrix, fitted to the loaded VAE.

A decoder costs as much as a denoising step or more. The matrix costs next to nothing and shows
composition and colours at latent resolution. It needs no constants per model family: a few smooth
colour fields are encoded once, and least squares finds the matrix.
"""

import logging
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from backends.generation import latents as latent_space
from backends.loading.offload import without_overflow
from backends.model_table import ModelSpec
from backends.parallel.vae import undivided

logger = logging.getLogger(__name__)

NUM_FIELDS = 6
FIELD_CELLS = 6
FIELD_PIXELS = 128


class Previewer:
    """Previews of one loaded pipeline. The matrix is fitted at the first preview."""

    def __init__(self, pipe: Any, *, spec: ModelSpec) -> None:
        self._pipe = pipe
        self._spec = spec
        self._matrix: Tensor | None = None
        self._is_fitted = False

    @torch.no_grad()
    def image(self, latents: Tensor, *, height: int, width: int) -> np.ndarray | None:
        """Return uint8 (h, w, 3) of model-space latents of a run of this size in pixels.

        Of a video, its middle frame. None if the VAE cannot be fitted, or if these are not its
        latents.
        """
        if not self._is_fitted:
            has_vae = getattr(self._pipe, "vae", None) is not None
            self._matrix, self._is_fitted = _fit(self._pipe) if has_vae else None, True
        if self._matrix is None:
            return None
        x = latents.detach().float()
        if self._spec.runs_as_is:
            if x.ndim == 3 and self._spec.output == "video":
                return None  # tokens, which do not tell how many frames they are
            x = _as_image(x, latent_space.num_channels(self._pipe.vae), aspect=height / width)
            if x is None:
                return None
        else:
            x = self._one_frame(x, height, width)
        x = x / x.std().clamp(min=1.0)  # early steps hold more noise than image
        x = latent_space.unscaled(x[None], vae=self._pipe.vae)[0]
        x = x.permute(1, 2, 0).cpu()
        pixels = torch.cat((x, torch.ones_like(x[..., :1])), dim=-1) @ self._matrix
        return latent_space.to_uint8(pixels.clamp(0, 1).numpy())

    def _one_frame(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Return (C, h, w) of the first image, or of the middle frame."""
        x = latent_space.unpack(
            latents, pipe=self._pipe, spec=self._spec, height=height, width=width
        )[0]
        if x.ndim == 3:
            return x
        frames = (
            x if x.shape[1] == latent_space.num_channels(self._pipe.vae) else x.transpose(0, 1)
        )  # svd: (F, C, h, w); ad: (C, F, h, w)
        return frames[frames.shape[0] // 2]


def _as_image(x: Tensor, channels: int, *, aspect: float) -> Tensor | None:
    """Return (C, h, w) of latents whose layout is not known, judged by their shape; None if no
    layout fits.

    x: (1, C, h, w), (1, C, F, h, w), (1, F, C, h, w), or tokens (1, h * w, C or 4 C).
    aspect: height / width of the result, which tokens do not tell.
    """
    x = x[0]
    if x.ndim == 2:
        number, width = x.shape
        h = round((number * aspect) ** 0.5)
        if h == 0 or number % h or width not in (channels, 4 * channels):
            return None
        side = 2 if width == 4 * channels else 1
        grid = x.reshape(h, number // h, channels, side, side).permute(2, 0, 3, 1, 4)
        return grid.reshape(channels, h * side, number // h * side)
    if x.ndim == 4:
        frames = x if x.shape[1] == channels else x.transpose(0, 1)
        x = frames[frames.shape[0] // 2]
    return x if x.ndim == 3 and x.shape[0] == channels else None


def _fit(pipe: Any) -> Tensor | None:
    """Return the (C + 1, 3) matrix from client-space latents and a constant 1 to RGB in 0..1.

    Only the rank whose client watches calls this.
    """
    fields = _colour_fields()
    try:
        # an offloaded VAE is moved to the device by its own hooks
        with undivided(), without_overflow(pipe.vae) as vae:
            pixels = (fields * 2 - 1).to(pipe._execution_device, vae.dtype)
            # one by one: HunyuanVideo 1.5's VAE takes no batch
            parts = [latent_space.encoded(one, vae=vae) for one in pixels.split(1)]
        encoded = torch.cat(parts).float().cpu()
        _, _, height, width = encoded.shape
    except Exception as error:  # noqa: BLE001  a job does well without previews
        logger.warning("no previews: the VAE cannot encode (%s)", error)
        return None
    small = F.interpolate(fields, size=(height, width), mode="area")
    x = encoded.permute(0, 2, 3, 1).reshape(-1, encoded.shape[1])
    y = small.permute(0, 2, 3, 1).reshape(-1, 3)
    if not torch.isfinite(x).all():
        logger.warning(
            "no previews: the VAE returns values that are not finite in %s", pipe.vae.dtype
        )
        return None
    return torch.linalg.lstsq(
        torch.cat((x, torch.ones_like(x[:, :1])), dim=1), y, driver="gelsd"
    ).solution


def _colour_fields() -> Tensor:
    """Return fixed smooth colours in 0..1: (NUM_FIELDS, 3, FIELD_PIXELS, FIELD_PIXELS)."""
    cells = torch.rand(
        NUM_FIELDS, 3, FIELD_CELLS, FIELD_CELLS, generator=torch.Generator().manual_seed(0)
    )
    return F.interpolate(cells, size=FIELD_PIXELS, mode="bilinear", align_corners=False)

"""Parallel VAE decode: every rank decodes one patch of rows. Exact, and the same for all backends.

The decoder's convolutions, group norms and attention exchange data with the other patches as they
run (patch_mode.py), so the image equals a single-rank decode up to summation order. Tiled decoding
keeps its tiles, and the ranks share each tile.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLTemporalDecoder
from torch import Tensor, nn

from backends.groups.collectives import gather_pieces
from backends.groups.mesh import Axis, Mesh
from backends.parallel import hooks
from backends.parallel.patch_bounds import PatchBounds, RowLayout, cut
from backends.parallel.patch_mode import (
    FreshExchange,
    PatchMode,
    attach_attention,
    detach_attention,
)

logger = logging.getLogger(__name__)

NAME = "patch decode"
SHARED = (AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLTemporalDecoder)
"""VAE classes whose decoders look beyond their rows only through operators that patch_mode handles.
"""
MIN_ROWS = 8
"""Smallest number of latent rows per rank for splitting. Below it every rank decodes the whole
image, because the exchange would cost what it saves.
"""


def attach_patch_decode(vae: nn.Module, mesh: Mesh, *axes: str) -> None:
    """Split every call of this VAE's decoder among the ranks of these axes (default: all axes).

    Afterwards all these ranks must decode together, and each gets the whole image. Nothing is
    attached for a single rank. A VAE of another class stays whole on every rank, with a warning in
    the log.
    """
    names = axes or tuple(name for name, _ in mesh.plan.axes)
    if not names or mesh.axis(*names).size == 1:
        return
    if not isinstance(vae, SHARED):
        logger.warning(
            "parallel_vae has no effect: %s cannot be cut into patches, so every rank decodes "
            "the whole image",
            type(vae).__name__,
        )
        return
    mode = PatchMode()
    attach_attention(vae.decoder, mode)
    hooks.attach(vae.decoder, NAME, _patch_call(vae, mesh, names, mode))


def splits_decode(vae: nn.Module) -> bool:
    """Whether the ranks decode this VAE's images together."""
    return isinstance(vae, SHARED) and NAME in hooks.attached(vae.decoder)


def detach_patch_decode(vae: nn.Module) -> None:
    """Undo `attach_patch_decode`. Does nothing if it is not attached."""
    if splits_decode(vae):
        hooks.detach(vae.decoder, NAME)
        detach_attention(vae.decoder)


def _patch_call(
    vae: nn.Module, mesh: Mesh, names: tuple[str, ...], mode: PatchMode
) -> Callable[..., Tensor]:
    doublings = len(vae.config.block_out_channels) - 1

    def around(forward: Callable[..., Tensor], sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """sample: latents (B, C, h, w) -> pixels (B, 3, H, W), whole on every rank."""
        axis = mesh.axis(*names)
        if sample.shape[-2] < MIN_ROWS * axis.size:
            return forward(sample, *args, **kwargs)
        rows = cut(sample.shape[-2], (1.0,) * axis.size)
        layout = RowLayout(rows, sample.shape[-1], patch=axis.rank, doublings=doublings)
        mine = sample.narrow(-2, rows.bounds[axis.rank], rows.size(axis.rank)).contiguous()
        with mode.on(layout, FreshExchange(axis=axis, traffic=mesh.traffic)):
            pixels = forward(mine, *args, **kwargs)
        return _join(pixels, rows.scaled(2**doublings), axis, mesh)

    return around


def _join(part: Tensor, rows: PatchBounds, axis: Axis, mesh: Mesh) -> Tensor:
    shapes = [(*part.shape[:-2], size, part.shape[-1]) for size in rows.sizes]
    return torch.cat(gather_pieces(part, shapes, axis=axis, traffic=mesh.traffic), dim=-2)

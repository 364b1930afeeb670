"""Training stages `decoder` and `encoder`: an AutoencoderKL whose latents are the fixed linear
ones.

The decoder learns to undo the truncation and the UNet's errors (latents are noised); the encoder is
regressed to the fixed latents and serves image-to-image only.
"""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from demo.data import training_images
from demo.latents import from_uint8, to_latents
from demo.model import make_vae

logger = logging.getLogger(__name__)

IMAGES = 1500
IMAGE_SIZE = 128
HELD_OUT_IMAGES = 48
LEARNING_RATE = {"decoder": 2e-3, "encoder": 3e-3}
LATENT_NOISE = 0.2  # largest standard deviation added to the decoder's input
LOG_EVERY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The half to train, for how long, and where its weights are."""

    half: Literal["decoder", "encoder"]
    seconds: float
    folder: Path
    start: Path | None = (
        None  # folder of an earlier checkpoint's VAE; used when `folder` holds none yet
    )
    seed: int = 1


def crop_size(progress: float) -> tuple[int, int]:
    """Return (batch, side in pixels): small crops first, whole images in the last quarter."""
    if progress < 0.2:
        return 32, 32
    return (16, 64) if progress < 0.75 else (5, IMAGE_SIZE)


def crops(images: Tensor, count: int, side: int) -> Tensor:
    """Return (count, 3, side, side) float32 in [-1, 1].

    Each is the busiest of four places on the 8-pixel grid.
    """
    chosen = []
    for i in torch.randint(len(images), (count,)).tolist():
        corners = (8 * torch.randint(0, (IMAGE_SIZE - side) // 8 + 1, (4, 2))).tolist()
        cuts = [images[i, :, y : y + side, x : x + side] for y, x in corners]
        chosen.append(max(cuts, key=lambda cut: cut[:, ::4, ::4].float().var((1, 2)).sum().item()))
    return (torch.stack(chosen).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _differences(pixels: Tensor, target: Tensor) -> Tensor:
    """Return the mean error of horizontal and vertical differences, which measures edge
    positions.
    """
    return sum((pixels.diff(dim=dim) - target.diff(dim=dim)).abs().mean() for dim in (2, 3))


def decoder_loss(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    latents = to_latents(pixels)
    noised = latents + torch.randn_like(latents) * (
        LATENT_NOISE * torch.rand(len(latents), 1, 1, 1)
    )
    decoded = vae.decode(noised).sample
    return (
        F.l1_loss(decoded, pixels) + 2 * F.mse_loss(decoded, pixels) + _differences(decoded, pixels)
    )


def encoder_loss(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    latents, encoded = to_latents(pixels), vae.encode(pixels).latent_dist.mean
    return F.l1_loss(encoded, latents) + F.mse_loss(encoded, latents)


@torch.no_grad()
def measure(vae: AutoencoderKL, pixels: Tensor) -> dict[str, float]:
    """Return PSNR in dB of decoded exact and noised (sigma 0.15) latents, and the encoder's rms
    error.
    """
    latents = to_latents(pixels)
    noised = latents + 0.15 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    encoded = vae.encode(pixels).latent_dist.mode()
    return {
        "psnr": _psnr(vae.decode(latents).sample, pixels),
        "psnr_noised": _psnr(vae.decode(noised).sample, pixels),
        "encoder_rms": round((encoded - latents).pow(2).mean().sqrt().item(), 4),
    }


def _psnr(decoded: Tensor, pixels: Tensor) -> float:
    error = (decoded.clamp(-1, 1) - pixels).pow(2).mean((1, 2, 3))
    return round((10 * torch.log10(4 / error)).mean().item(), 2)


def load_vae(plan: Plan) -> AutoencoderKL:
    """Return this run's VAE if it exists, else the earlier checkpoint's, else an untrained one."""
    for folder in (plan.folder, plan.start):
        if folder and (folder / "config.json").exists():
            return AutoencoderKL.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return make_vae()


def train_vae(plan: Plan) -> None:
    """Train one half for `plan.seconds` of wall time and save the VAE in `plan.folder`.

    The learning rate follows a cosine schedule.
    """
    torch.manual_seed(plan.seed)
    images, _ = training_images(IMAGES, seed=50_000, size=IMAGE_SIZE)
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    held_out = from_uint8(training_images(HELD_OUT_IMAGES, seed=99, size=IMAGE_SIZE)[0])
    vae = load_vae(plan).to(memory_format=torch.channels_last)
    parts = (
        [vae.decoder, vae.post_quant_conv]
        if plan.half == "decoder"
        else [vae.encoder, vae.quant_conv]
    )
    parameters = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE[plan.half], betas=(0.9, 0.99), weight_decay=1e-4
    )
    loss_of = decoder_loss if plan.half == "decoder" else encoder_loss
    logger.info("%s before: %s", plan.half, measure(vae, held_out))
    began = logged = time.monotonic()
    step = 0
    while (progress := (time.monotonic() - began) / plan.seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = (
                LEARNING_RATE[plan.half]
                * min(1, (step + 1) / 40)
                * (0.5 + 0.5 * math.cos(math.pi * progress))
                + 1e-5
            )
        loss = loss_of(vae, crops(images, *crop_size(progress)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if time.monotonic() - logged > LOG_EVERY_S:
            logged = time.monotonic()
            logger.info(
                "%s step %d, %.0f %%, loss %.4f, %s",
                plan.half,
                step,
                100 * progress,
                loss.item(),
                measure(vae, held_out),
            )
            vae.save_pretrained(plan.folder)
    vae.save_pretrained(plan.folder)
    logger.info("%s after %d steps: %s", plan.half, step, measure(vae, held_out))

"""The networks that are timed: random weights with a fixed seed.

Their sizes let one step take about two seconds of one CPU core.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

SEED = 0
GUIDANCE = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A denoiser in the form that backends expect.

    `pipe` has what a diffusers pipeline of `model_type` has; `predict` runs one guided step.
    """

    model_type: str
    pipe: Any
    sample: Tensor
    predict: Callable[[Tensor, Tensor], Tensor]


def sdxl_like_unet(*, side: int = 64, is_guided: bool = True) -> Subject:
    """Return a UNet of 116 M parameters for latents of side x side.

    With guidance the batch has two halves.
    """
    torch.manual_seed(SEED)
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(96, 192, 384),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 4),
        attention_head_dim=(3, 6, 12),
        cross_attention_dim=512,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=64,
        projection_class_embeddings_input_dim=64 * 6 + 256,
    ).eval()
    halves = 2 if is_guided else 1
    conditions = {
        "text_embeds": torch.randn(halves, 256),
        "time_ids": torch.tensor([[512.0, 512, 0, 0, 512, 512]] * halves),
    }
    text = torch.randn(halves, 77, 512)

    def predict(sample: Tensor, timestep: Tensor) -> Tensor:
        batch = torch.cat([sample] * halves)
        noise = pipe.unet(
            batch,
            timestep,
            encoder_hidden_states=text,
            added_cond_kwargs=conditions,
            return_dict=False,
        )[0]
        return _guided(noise) if is_guided else noise

    pipe = SimpleNamespace(unet=unet, scheduler=_scheduler())
    return Subject(
        model_type="sdxl", pipe=pipe, sample=torch.randn(1, 4, side, side), predict=predict
    )


def sd3_like_transformer(*, side: int = 64, is_guided: bool = True) -> Subject:
    """Return a transformer: 8 layers of 8 heads of 64, one token per 2x2 latents, 64 text tokens.

    With guidance the batch has two halves.
    """
    torch.manual_seed(SEED)
    transformer = SD3Transformer2DModel(
        sample_size=64,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=8,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=512,
        caption_projection_dim=512,
        pooled_projection_dim=512,
        pos_embed_max_size=64,
    ).eval()
    halves = 2 if is_guided else 1
    text, pooled = torch.randn(halves, 64, 512), torch.randn(halves, 512)

    def predict(sample: Tensor, timestep: Tensor) -> Tensor:
        noise = pipe.transformer(
            hidden_states=torch.cat([sample] * halves),
            timestep=timestep.expand(halves),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        return _guided(noise) if is_guided else noise

    pipe = SimpleNamespace(transformer=transformer, scheduler=_scheduler())
    return Subject(
        model_type="sd3", pipe=pipe, sample=torch.randn(1, 16, side, side), predict=predict
    )


def sdxl_like_vae() -> AutoencoderKL:
    """Return a VAE whose decoder has half of SDXL's width."""
    torch.manual_seed(SEED)
    channels = (64, 128, 256, 256)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=4,
    ).eval()


SUBJECTS: dict[str, Callable[..., Subject]] = {"unet": sdxl_like_unet, "dit": sd3_like_transformer}


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
    )


def _guided(both: Tensor) -> Tensor:
    unconditional, conditional = both.chunk(2)
    return unconditional + GUIDANCE * (conditional - unconditional)

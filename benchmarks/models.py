"""The networks that are timed: random weights with a fixed seed.

One step of `unet` and `dit` takes about two seconds of one CPU core. The `deep` networks have as
many layers as SDXL, SD3 and FLUX.1 and hardly any arithmetic: a step is the time of its launches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
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
    return _unet(
        channels=(96, 192, 384),
        heads=(3, 6, 12),
        depths=(1, 2, 4),
        text_width=512,
        side=side,
        is_guided=is_guided,
    )


def deep_unet(*, side: int = 16, is_guided: bool = True) -> Subject:
    """Return a UNet of SDXL's depth: as many resnets and transformer blocks, narrow."""
    return _unet(
        channels=(32, 64, 64),
        heads=(1, 2, 2),
        depths=(1, 2, 10),
        text_width=64,
        side=side,
        is_guided=is_guided,
    )


def _unet(
    *,
    channels: tuple[int, ...],
    heads: tuple[int, ...],
    depths: tuple[int, ...],
    text_width: int,
    side: int,
    is_guided: bool,
) -> Subject:
    torch.manual_seed(SEED)
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=depths,
        attention_head_dim=heads,  # their number, by this class's old name
        cross_attention_dim=text_width,
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
    text = torch.randn(halves, 77, text_width)

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
    return _sd3(layers=8, heads=8, head_width=64, width=512, side=side, is_guided=is_guided)


def deep_sd3(*, side: int = 16, is_guided: bool = True) -> Subject:
    """Return a transformer of SD3 medium's depth, narrow."""
    return _sd3(layers=24, heads=2, head_width=16, width=32, side=side, is_guided=is_guided)


def _sd3(
    *, layers: int, heads: int, head_width: int, width: int, side: int, is_guided: bool
) -> Subject:
    torch.manual_seed(SEED)
    transformer = SD3Transformer2DModel(
        sample_size=64,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=head_width,
        num_attention_heads=heads,
        joint_attention_dim=width,
        caption_projection_dim=width,
        pooled_projection_dim=width,
        pos_embed_max_size=64,
    ).eval()
    halves = 2 if is_guided else 1
    text, pooled = torch.randn(halves, 64, width), torch.randn(halves, width)

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


def deep_flux(*, side: int = 16) -> Subject:
    """Return a transformer of FLUX.1's depth, narrow. Guidance is an input: the batch is one."""
    torch.manual_seed(SEED)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    tokens = side // 2
    rows, columns = torch.meshgrid(torch.arange(tokens), torch.arange(tokens), indexing="ij")
    places = torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(-1, 3).float()
    text, pooled = torch.randn(1, 64, 32), torch.randn(1, 32)

    def predict(sample: Tensor, timestep: Tensor) -> Tensor:
        return pipe.transformer(
            hidden_states=sample,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=timestep.expand(1) / 1000,
            img_ids=places,
            txt_ids=torch.zeros(64, 3),
            guidance=torch.full((1,), GUIDANCE),
            return_dict=False,
        )[0]

    pipe = SimpleNamespace(transformer=transformer, scheduler=_scheduler())
    return Subject(
        model_type="flux", pipe=pipe, sample=torch.randn(1, tokens**2, 64), predict=predict
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
DEEP: dict[str, Callable[..., Subject]] = {
    "deep_unet": deep_unet,
    "deep_sd3": deep_sd3,
    "deep_flux": deep_flux,
}


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

"""The denoiser of each model type: real block layout, four (or three) levels of 8 and 16 channels,
or four blocks of 4 heads x 8.

Keywords replace fields of the denoiser's config; a field that another one fixes follows it unless
it is given too.
"""

from diffusers import (
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    MotionAdapter,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)

from tests.checkpoints.parts import WIDTH

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


def unet(**config: object) -> UNet2DConditionModel:
    """The UNet of Stable Diffusion 1. In these models attention_head_dim is the number of heads."""
    fields = {
        "sample_size": 16,
        "layers_per_block": 2,
        "block_out_channels": (8, 16, 16, 16),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": WIDTH,
        "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", CROSS_UP, CROSS_UP, CROSS_UP),
    }
    return UNet2DConditionModel(**(fields | config))


def unet_sd2(**config: object) -> UNet2DConditionModel:
    return unet(
        **(
            {
                "attention_head_dim": (2, 4, 4, 4),
                "use_linear_projection": True,
                "upcast_attention": True,
            }
            | config
        )
    )


def unet_sdxl(**config: object) -> UNet2DConditionModel:
    """Three levels; takes both text encoders side by side, and the second one's pooled state and
    six sizes besides.
    """
    fields = {
        "block_out_channels": (8, 16, 16),
        "attention_head_dim": (2, 4, 4),
        "cross_attention_dim": 3 * WIDTH,
        "down_block_types": ("DownBlock2D", CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP, "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 2 * WIDTH,
    }
    return unet(**(fields | config))


def unet_upscale(**config: object) -> UNet2DConditionModel:
    """The x4 upscaler: four latent and three image channels in, the noise level as a class."""
    fields = {
        "sample_size": 32,
        "in_channels": 7,
        "num_class_embeds": 1000,
        "use_linear_projection": True,
        "only_cross_attention": (True, True, True, False),
        "down_block_types": ("DownBlock2D", CROSS_DOWN, CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP, CROSS_UP, "UpBlock2D"),
    }
    return unet(**(fields | config))


def unet_video(**config: object) -> UNetSpatioTemporalConditionModel:
    """Stable Video Diffusion. Norms have 32 groups whatever the config says: every level is a
    multiple of 32 wide.
    """
    fields = {
        "sample_size": 16,
        "layers_per_block": 2,
        "block_out_channels": (32, 32, 32, 32),
        "num_attention_heads": (2, 4, 4, 4),
        "cross_attention_dim": WIDTH,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 3 * 8,
        "transformer_layers_per_block": 1,
        "num_frames": 14,
    }
    return UNetSpatioTemporalConditionModel(**(fields | config))


def motion_adapter(block_out_channels: tuple[int, ...] = (8, 16, 16, 16)) -> MotionAdapter:
    """AnimateDiff's motion modules for a UNet with the same levels; up to 32 frames."""
    return MotionAdapter(
        block_out_channels=block_out_channels,
        motion_layers_per_block=2,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=32,
        use_motion_mid_block=False,
    )


def transformer_sd3(**config: object) -> SD3Transformer2DModel:
    """joint_attention_dim and pooled_projection_dim are those of the two CLIP encoders side by
    side.
    """
    fields = _heads(config) | {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 4,
        "joint_attention_dim": 2 * WIDTH,
        "pooled_projection_dim": 2 * WIDTH,
        "pos_embed_max_size": 32,
    }
    fields["caption_projection_dim"] = fields["num_attention_heads"] * fields["attention_head_dim"]
    return SD3Transformer2DModel(**(fields | config))


def transformer_flux(**config: object) -> FluxTransformer2DModel:
    """in_channels is four latent channels' worth: 2 x 2 latents are packed into one token."""
    fields = _heads(config) | {
        "in_channels": 64,
        "num_layers": 4,
        "num_single_layers": 4,
        "joint_attention_dim": WIDTH,
        "pooled_projection_dim": WIDTH,
        "guidance_embeds": True,
    }
    quarter = fields["attention_head_dim"] // 4
    fields["axes_dims_rope"] = (
        quarter,
        quarter,
        2 * quarter,
    )  # each even, together the head's width
    return FluxTransformer2DModel(**(fields | config))


def transformer_hunyuan(**config: object) -> HunyuanDiT2DModel:
    """An even number of blocks (the second half takes skips from the first)."""
    fields = _heads(config) | {
        "in_channels": 4,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "sample_size": 16,
        "num_layers": 4,
        "cross_attention_dim": WIDTH,
        "cross_attention_dim_t5": WIDTH,
        "pooled_projection_dim": WIDTH,
        "text_len": 77,
        "text_len_t5": 256,
        "use_style_cond_and_image_meta_size": False,
    }
    fields["hidden_size"] = fields["num_attention_heads"] * fields["attention_head_dim"]
    return HunyuanDiT2DModel(**(fields | config))


def transformer_pixart(**config: object) -> PixArtTransformer2DModel:
    fields = _heads(config) | {
        "in_channels": 4,
        "out_channels": 8,  # the second half is a variance that the pipeline drops
        "num_layers": 4,
        "sample_size": 16,
        "caption_channels": WIDTH,
        "use_additional_conditions": False,
    }
    fields["cross_attention_dim"] = fields["num_attention_heads"] * fields["attention_head_dim"]
    return PixArtTransformer2DModel(**(fields | config))


def _heads(config: dict[str, object]) -> dict[str, object]:
    """Number and width of the heads, from which the transformers' other widths follow."""
    return {
        "num_attention_heads": config.get("num_attention_heads", 4),
        "attention_head_dim": config.get("attention_head_dim", 8),
    }

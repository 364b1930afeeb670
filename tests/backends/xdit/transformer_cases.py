"""Tiny transformers of the classes with a row, and a call of each: two images of 20 or more
tokens where the class takes a batch, text lengths that do not divide, padding where it takes masks.
"""

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tests.backends.xdit.transformer_inputs import (
    COG,
    COGVIDEO,
    FLUX_LIKE,
    HEADS,
    HUNYUAN,
    HUNYUAN_VIDEO,
    LTX,
    LUMINA,
    SIZES,
    TEXT,
    WAN,
    allegro_positions,
    cogvideo_positions,
    hunyuan_video,
    ideogram,
    image_and_text,
    krea,
    omnigen,
    padding,
    randn,
    steps,
    with_ids,
)

CASES: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "AllegroTransformer3DModel": (
        COG
        | HEADS
        | {"cross_attention_dim": 32, "caption_channels": 16}
        | {
            "sample_width": 12,
            "sample_height": 10,
            "sample_frames": 2,
            "attention_head_dim": 12,
            "num_attention_heads": 4,
            "cross_attention_dim": 48,
        },
        lambda: image_and_text(
            4,
            2,
            10,
            12,
            attention_mask=torch.ones(2, 2, 10, 12),
            encoder_attention_mask=padding(kind=torch.long),
            image_rotary_emb=allegro_positions(2, 5, 6),
        ),
    ),
    "AnyFlowTransformer3DModel": (
        WAN | {"gate_value": 0.25, "deltatime_type": "r"},
        lambda: (
            image_and_text(2, 4, 10, 12)
            | {"timestep": torch.full((2, 2), 500.0), "r_timestep": torch.full((2, 2), 250.0)}
        ),
    ),
    "AuraFlowTransformer2DModel": (
        HEADS
        | {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "caption_projection_dim": 32,
            "joint_attention_dim": 16,
            "pos_embed_max_size": 64,
        },
        lambda: image_and_text(4, 10, 12),
    ),
    "BriaTransformer2DModel": (
        FLUX_LIKE | {"pooled_projection_dim": None, "axes_dims_rope": [0, 4, 4]},
        lambda: with_ids(4, 32),
    ),
    "BriaFiboTransformer2DModel": (
        FLUX_LIKE
        | {
            "pooled_projection_dim": None,
            "axes_dims_rope": [0, 4, 4],
            "joint_attention_dim": 32,
            "text_encoder_dim": 16,
        },
        lambda: with_ids(4, 32, text_encoder_layers=[randn(2, TEXT, 16) for _ in range(4)]),
    ),
    "ChromaTransformer2DModel": (
        FLUX_LIKE
        | {
            "axes_dims_rope": [2, 2, 4],
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        lambda: with_ids(
            4, 32, attention_mask=torch.cat((padding(), torch.ones(2, 30, dtype=bool)), dim=1)
        ),
    ),
    "ChronoEditTransformer3DModel": (
        WAN | {"rope_temporal_skip_len": 8},
        lambda: image_and_text(4, 2, 10, 12),
    ),
    "CogVideoXTransformer3DModel": (
        COGVIDEO | {"use_rotary_positional_embeddings": True},
        lambda: image_and_text(2, 4, 10, 12, image_rotary_emb=cogvideo_positions()),
    ),
    "ConsisIDTransformer3DModel": (
        COGVIDEO
        | {
            "cross_attn_interval": 1,
            "is_train_face": True,
            "cross_attn_dim_head": 4,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 2,
            "LFE_vit_dim": 2,
            "LFE_depth": 5,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 1,
            "LFE_num_querie": 2,
            "LFE_output_dim": 42,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 1,
        },
        lambda: image_and_text(2, 4, 10, 12, id_vit_hidden=[randn(2, 2, 2)], id_cond=randn(2, 2)),
    ),
    "CogView3PlusTransformer2DModel": (
        COG
        | HEADS
        | {
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "condition_dim": 2,
            "pos_embed_max_size": 16,
            "sample_size": 16,
        },
        lambda: image_and_text(4, 10, 12, **SIZES),
    ),
    "CogView4Transformer2DModel": (
        COG | HEADS | {"text_embed_dim": 16, "time_embed_dim": 8, "condition_dim": 4},
        lambda: image_and_text(4, 10, 12, **SIZES),
    ),
    "DiTTransformer2DModel": (
        HEADS | {"in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 10},
        lambda: {
            "hidden_states": randn(2, 4, 10, 10),
            "timestep": steps(),
            "class_labels": torch.tensor([1, 5]),
        },
    ),
    "EasyAnimateTransformer3DModel": (
        HEADS
        | {
            "attention_head_dim": 16,
            "in_channels": 4,
            "mmdit_layers": 2,
            "num_layers": 3,
            "out_channels": 4,
            "patch_size": 2,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "time_position_encoding_type": "3d_rope",
        },
        lambda: image_and_text(4, 2, 10, 12),
    ),
    "ErnieImageTransformer2DModel": (
        {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_layers": 2,
            "ffn_hidden_size": 32,
            "in_channels": 8,
            "out_channels": 8,
            "patch_size": 1,
            "text_in_dim": 16,
            "rope_theta": 256,
            "rope_axes_dim": (8, 4, 4),
            "qk_layernorm": True,
        },
        lambda: {
            "hidden_states": randn(2, 8, 5, 6),
            "timestep": steps(),
            "text_bth": randn(2, TEXT, 16),
            "text_lens": torch.tensor([TEXT, TEXT - 2]),
        },
    ),
    "GlmImageTransformer2DModel": (
        COG
        | HEADS
        | {
            "text_embed_dim": 16,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 64,
        },
        lambda: (
            image_and_text(4, 10, 12)
            | {
                "prior_token_id": torch.arange(60).view(2, 30),
                "prior_token_drop": torch.tensor([[False] * 30, [True] * 30]),
                "target_size": SIZES["target_size"],
                "crop_coords": SIZES["crop_coords"],
            }
        ),
    ),
    "HiDreamImageTransformer2DModel": (
        HEADS
        | {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "caption_channels": [8, 4],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (24, 24),
            "llama_layers": (0, 1, 0, 1),
            "force_inference_output": True,
        },
        lambda: {
            "hidden_states": randn(2, 4, 10, 10),
            "timesteps": steps(),
            "encoder_hidden_states_t5": randn(2, TEXT, 8),
            "encoder_hidden_states_llama3": randn(2, 2, 5, 4),
            "pooled_embeds": randn(2, 8),
        },
    ),
    "HunyuanVideoTransformer3DModel": (
        HUNYUAN_VIDEO | {"guidance_embeds": True},
        lambda: hunyuan_video(guidance=steps()),
    ),
    "HunyuanVideoTransformer3DModel first frame": (
        HUNYUAN_VIDEO | {"guidance_embeds": False, "image_condition_type": "token_replace"},
        hunyuan_video,
    ),
    "HunyuanVideoFramepackTransformer3DModel": (
        HUNYUAN_VIDEO
        | {
            "patch_size": 2,
            "guidance_embeds": True,
            "has_image_proj": True,
            "image_proj_dim": 16,
            "has_clean_x_embedder": True,
        },
        lambda: (
            image_and_text(4, 3, 8, 8)
            | {
                "pooled_projections": randn(2, 8),
                "encoder_attention_mask": padding(),
                "guidance": steps(),
                "image_embeds": randn(2, 3, 16),
                "indices_latents": torch.arange(3),
                "latents_clean": randn(2, 4, 2, 8, 8),
                "indices_latents_clean": torch.arange(2),
                "latents_history_2x": randn(2, 4, 2, 8, 8),
                "indices_latents_history_2x": torch.arange(2),
                "latents_history_4x": randn(2, 4, 8, 8, 8),
                "indices_latents_history_4x": torch.arange(8),
            }
        ),
    ),
    "HunyuanVideo15Transformer3DModel": (
        HUNYUAN
        | {
            "mlp_ratio": 2.0,
            "patch_size_t": 1,
            "text_embed_2_dim": 8,
            "image_embed_dim": 12,
            "target_size": 16,
            "task_type": "t2v",
        },
        lambda: (
            image_and_text(4, 2, 4, 5)
            | {
                "encoder_hidden_states_2": randn(2, 3, 8),
                "encoder_attention_mask": padding(kind=torch.long),
                "encoder_attention_mask_2": padding(length=3, kind=torch.long),
                "image_embeds": torch.zeros(2, 3, 12),
            }
        ),
    ),
    "HunyuanImageTransformer2DModel": (
        HUNYUAN
        | {
            "num_single_layers": 2,
            "patch_size": (1, 1),
            "guidance_embeds": False,
            "text_embed_2_dim": 8,
            "rope_axes_dim": (4, 4),
        },
        lambda: (
            image_and_text(4, 5, 6)
            | {
                "encoder_hidden_states_2": randn(2, 3, 8),
                "encoder_attention_mask": padding(),
                "encoder_attention_mask_2": padding(length=3),
            }
        ),
    ),
    "Ideogram4Transformer2DModel": (
        HEADS
        | {
            "in_channels": 8,
            "num_layers": 2,
            "intermediate_size": 32,
            "adaln_dim": 16,
            "llm_features_dim": 16,
            "rope_theta": 10_000,
            "mrope_section": (2, 1, 1),
        },
        ideogram,
    ),
    "JoyImageEditTransformer3DModel": (
        {
            "patch_size": [1, 2, 2],
            "in_channels": 4,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "text_dim": 16,
            "num_layers": 2,
            "rope_dim_list": [4, 6, 6],
            "theta": 256,
        },
        lambda: image_and_text(4, 1, 10, 12),
    ),
    "Kandinsky5Transformer3DModel": (
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "model_dim": 64,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
            "visual_cond": False,
        },
        lambda: {
            "hidden_states": randn(1, 2, 10, 12, 4),
            "encoder_hidden_states": randn(1, TEXT, 16),
            "timestep": steps(1),
            "pooled_projections": randn(1, 8),
            "visual_rope_pos": [torch.arange(2), torch.arange(5), torch.arange(6)],
            "text_rope_pos": torch.arange(TEXT),
        },
    ),
    "Krea2Transformer2DModel": (
        HEADS
        | {
            "in_channels": 8,
            "num_layers": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 16,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
            "rope_theta": 1000.0,
        },
        krea,
    ),
    "LongCatImageTransformer2DModel": (
        FLUX_LIKE | {"pooled_projection_dim": 32, "axes_dims_rope": [2, 2, 4]},
        lambda: with_ids(4, 32, guidance=steps()),
    ),
    "LTXVideoTransformer3DModel": (
        LTX,
        lambda: image_and_text(
            60, 4, encoder_attention_mask=padding(), num_frames=2, height=5, width=6
        ),
    ),
    "LTXVideoTransformer3DModel conditioned": (
        LTX,
        lambda: (
            image_and_text(60, 4, encoder_attention_mask=padding(), num_frames=2, height=5, width=6)
            | {"timestep": torch.rand(2, 60) * 1000}
        ),
    ),
    "LTX2VideoTransformer3DModel": (
        LTX
        | {
            "patch_size": 1,
            "patch_size_t": 1,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 4,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 16,
            "rope_double_precision": False,
        },
        lambda: (
            image_and_text(60, 4)
            | {
                "audio_hidden_states": randn(2, 9, 4),
                "audio_encoder_hidden_states": randn(2, TEXT, 16),
                "encoder_attention_mask": padding(),
                "num_frames": 2,
                "height": 5,
                "width": 6,
                "audio_num_frames": 9,
                "fps": 25.0,
            }
        ),
    ),
    "Lumina2Transformer2DModel": (
        LUMINA
        | {
            "num_refiner_layers": 1,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (128, 128, 128),
            "cap_feat_dim": 16,
        },
        lambda: (
            image_and_text(4, 10, 12, encoder_attention_mask=padding())
            | {"timestep": torch.tensor([0.5, 0.25])}
        ),
    ),
    "LuminaNextDiT2DModel": (
        LUMINA | {"cross_attention_dim": 16, "learn_sigma": False},
        lambda: (
            image_and_text(4, 10, 12, cross_attention_kwargs={})
            | {"encoder_mask": padding(), "image_rotary_emb": randn(384, 384, 4)}
        ),
    ),
    "OmniGenTransformer2DModel": (
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 32,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 100,
            "in_channels": 4,
            "time_step_dim": 4,
            "rope_scaling": {"long_factor": [1, 2, 3, 4], "short_factor": [1, 2, 3, 4]},
        },
        omnigen,
    ),
    "OvisImageTransformer2DModel": (
        FLUX_LIKE | {"out_channels": 4, "axes_dims_rope": (2, 2, 4)},
        lambda: with_ids(4, 32),
    ),
    "QwenImageTransformer2DModel": (
        HEADS
        | {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (2, 2, 4),
            "patch_size": 1,
        },
        lambda: (
            image_and_text(30, 4)
            | {"encoder_hidden_states_mask": padding(), "img_shapes": [[(1, 5, 6)]] * 2}
        ),
    ),
    "QwenImageTransformer2DModel edit": (
        HEADS
        | {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (2, 2, 4),
            "patch_size": 1,
            "zero_cond_t": True,
        },
        lambda: (
            image_and_text(50, 4)
            | {"encoder_hidden_states_mask": padding(), "img_shapes": [[(1, 5, 6), (1, 4, 5)]] * 2}
        ),
    ),
    "SkyReelsV2Transformer3DModel": (WAN, lambda: image_and_text(4, 2, 10, 12)),
    "SkyReelsV2Transformer3DModel forcing": (
        WAN | {"num_frame_per_block": 1, "inject_sample_info": True},
        lambda: (
            image_and_text(4, 2, 10, 12, enable_diffusion_forcing=True, fps=[0])
            | {
                "timestep": torch.tensor([[500.0, 250.0]]),
                "hidden_states": randn(1, 4, 2, 10, 12),
                "encoder_hidden_states": randn(1, TEXT, 16),
            }
        ),
    ),
    "WanTransformer3DModel": (WAN, lambda: image_and_text(4, 2, 10, 12)),
    "WanTransformer3DModel image": (
        WAN | {"image_dim": 16, "added_kv_proj_dim": 48, "pos_embed_seq_len": None},
        lambda: image_and_text(4, 2, 10, 12, encoder_hidden_states_image=randn(2, 5, 16)),
    ),
    "WanTransformer3DModel timesteps": (
        WAN,
        lambda: image_and_text(4, 2, 10, 12) | {"timestep": torch.rand(2, 60) * 1000},
    ),
    "WanAnimateTransformer3DModel": (
        WAN
        | {
            "in_channels": 12,
            "num_layers": 4,
            "latent_channels": 4,
            "image_dim": 16,
            "motion_encoder_size": 16,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        lambda: (
            image_and_text(12, 21, 4, 4)
            | {
                "hidden_states": randn(1, 12, 21, 4, 4),
                "timestep": steps(1),
                "encoder_hidden_states": randn(1, TEXT, 16),
                "encoder_hidden_states_image": randn(1, 5, 16),
                "pose_hidden_states": randn(1, 4, 20, 4, 4),
                "face_pixel_values": randn(1, 3, 77, 16, 16),
            }
        ),
    ),
    "WanVACETransformer3DModel": (
        WAN | {"num_layers": 4, "vace_layers": [0, 2], "vace_in_channels": 12},
        lambda: image_and_text(4, 2, 10, 12, control_hidden_states=randn(2, 12, 2, 10, 12)),
    ),
}
"""Class name (and variant) -> its configuration, and the arguments of a call."""


def build(case: str) -> nn.Module:
    """The transformer, with weights large enough for every token to matter to every other."""
    config, _ = CASES[case]
    torch.manual_seed(0)
    kind = getattr(diffusers, case.split()[0], None) or _class_of(case.split()[0])
    model = kind(**config).eval()
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1)
        if name.endswith("norm.weight"):
            parameter.data += 1
    return model


def _class_of(name: str) -> Any:
    from diffusers.models import transformers

    return getattr(transformers, name)


def call(model: nn.Module, case: str) -> list[Tensor]:
    """The tensors that a call returns."""
    torch.manual_seed(1)
    arguments = CASES[case][1]()
    known = inspect.signature(model.forward).parameters
    assert set(arguments) <= set(known), sorted(set(arguments) - set(known))
    with torch.no_grad():
        output = model(**arguments)
    return [value for value in output.values() if torch.is_tensor(value)]

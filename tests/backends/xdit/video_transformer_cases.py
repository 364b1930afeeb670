"""Tiny transformers of videos, and a call of each (transformer_cases.py)."""

from collections.abc import Callable
from typing import Any

import torch

from tests.backends.xdit.transformer_inputs import (
    COG,
    COGVIDEO,
    HEADS,
    HUNYUAN,
    HUNYUAN_VIDEO,
    LTX,
    TEXT,
    WAN,
    allegro_positions,
    cogvideo_positions,
    hunyuan_video,
    image_and_text,
    padding,
    randn,
    steps,
)

VIDEO_CASES: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
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

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
    FLUX_LIKE,
    HEADS,
    HUNYUAN,
    LUMINA,
    SIZES,
    TEXT,
    ideogram,
    image_and_text,
    krea,
    omnigen,
    padding,
    randn,
    steps,
    with_ids,
)
from tests.backends.xdit.video_transformer_cases import VIDEO_CASES

CASES: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    **VIDEO_CASES,
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

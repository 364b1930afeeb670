"""Tiny components of the model families of 2025 and 2026, for assembled.py."""

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import transformers
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

from tests.checkpoints import denoisers
from tests.checkpoints.modern import ENCODER, MULTIMODAL_ROPE
from tests.checkpoints.parts import HEADS, WIDTH
from tests.checkpoints.upstream import hub, tokenizers
from tests.checkpoints.vocabulary import chat_tokenizer, t5_tokenizer

HEAD = {"num_attention_heads": HEADS, "attention_head_dim": 8}
CONFIGS: Mapping[str, dict[str, Any]] = {
    "LTX2VideoTransformer3DModel": HEAD
    | {
        "in_channels": 4,
        "out_channels": 4,
        "cross_attention_dim": WIDTH,
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": HEADS,
        "audio_attention_head_dim": 4,
        "audio_cross_attention_dim": 16,
        "num_layers": 3,
        "caption_channels": WIDTH,
        "rope_double_precision": False,
        "rope_type": "split",
    },
    "AutoencoderKLLTX2Video": {
        "latent_channels": 4,
        "block_out_channels": (8, 16, 16, 32),
        "decoder_block_out_channels": (8, 16, 32),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1),
        "patch_size": 2,
        "spatial_compression_ratio": 16,
        "temporal_compression_ratio": 8,
        "decoder_causal": False,
    },
    "AutoencoderKLLTX2Audio": {
        "base_channels": 4,
        "output_channels": 2,
        "ch_mult": (1,),
        "num_res_blocks": 1,
        "attn_resolutions": None,
        "in_channels": 2,
        "resolution": 32,
        "latent_channels": 2,
        "norm_type": "pixel",
        "causality_axis": "height",
        "mid_block_add_attention": False,
        "sample_rate": 16000,
        "mel_hop_length": 160,
        "is_causal": True,
        "mel_bins": 8,
    },
    "HunyuanVideoTransformer3DModel": HEAD
    | {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "guidance_embeds": True,
        "text_embed_dim": WIDTH,
        "pooled_projection_dim": WIDTH,
        "rope_axes_dim": (2, 2, 4),
    },
    "AutoencoderKLHunyuanVideo": {
        "latent_channels": 4,
        "down_block_types": ("HunyuanVideoDownBlock3D",) * 4,
        "up_block_types": ("HunyuanVideoUpBlock3D",) * 4,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    "HunyuanVideo15Transformer3DModel": HEAD
    | {
        "in_channels": 9,
        "out_channels": 4,
        "num_layers": 3,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": WIDTH,
        "text_embed_2_dim": WIDTH,
        "image_embed_dim": 12,
        "rope_axes_dim": (2, 2, 4),
        "target_size": 16,
        "task_type": "t2v",
    },
    "AutoencoderKLHunyuanVideo15": {
        "latent_channels": 4,
        "block_out_channels": (16, 16, 16, 16, 16),
        "layers_per_block": 1,
        "downsample_match_channel": False,
        "upsample_match_channel": False,
    },
    "Lumina2Transformer2DModel": {
        "sample_size": 16,
        "in_channels": 16,
        "hidden_size": 32,
        "num_layers": 3,
        "num_refiner_layers": 1,
        "num_attention_heads": HEADS,
        "num_kv_heads": HEADS,
        "multiple_of": 16,
        "axes_dim_rope": (4, 2, 2),
        "cap_feat_dim": WIDTH,
    },
    "SanaTransformer2DModel": HEAD
    | {
        "patch_size": 1,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "num_cross_attention_heads": HEADS,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 32,
        "caption_channels": WIDTH,
        "sample_size": 4,
    },
    "AutoencoderDC": {
        "latent_channels": 4,
        "attention_head_dim": 2,
        "encoder_block_types": ("ResBlock",) * 5 + ("EfficientViTBlock",),
        "decoder_block_types": ("ResBlock",) * 5 + ("EfficientViTBlock",),
        "encoder_block_out_channels": (8,) * 6,
        "decoder_block_out_channels": (8,) * 6,
        "encoder_qkv_multiscales": ((),) * 5 + ((5,),),
        "decoder_qkv_multiscales": ((),) * 5 + ((5,),),
        "encoder_layers_per_block": (1,) * 6,
        "decoder_layers_per_block": (1,) * 6,
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
        "scaling_factor": 0.41407,
    },
    # large patches, because the class scales every image to 128 latents on a side; and more
    # positions than those need, because images that are not square are filled up with the others
    "HiDreamImageTransformer2DModel": HEAD
    | {
        "patch_size": 8,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "caption_channels": [WIDTH, WIDTH],
        "text_emb_dim": 2 * WIDTH,
        "num_routed_experts": 4,
        "num_activated_experts": 2,
        "axes_dims_rope": (4, 2, 2),
        "max_resolution": (160, 128),
        "llama_layers": (0, 1),
        "force_inference_output": True,
    },
    "Krea2Transformer2DModel": HEAD
    | {
        "in_channels": 64,
        "num_layers": 3,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "timestep_embed_dim": 8,
        "text_hidden_dim": WIDTH,
        "num_text_layers": 3,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 1,
        "text_intermediate_size": 16,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (4, 2, 2),
        "rope_theta": 1000.0,
    },
    "LongCatImageTransformer2DModel": HEAD
    | {
        "num_layers": 2,
        "num_single_layers": 2,
        "joint_attention_dim": WIDTH,
        "pooled_projection_dim": WIDTH,
        "axes_dims_rope": (2, 2, 4),
    },
    "HeliosTransformer3DModel": {
        "num_attention_heads": HEADS,
        "attention_head_dim": 12,
        "text_dim": WIDTH,
        "freq_dim": 32,
        "ffn_dim": 2 * WIDTH,
        "num_layers": 3,
        "rope_dim": (4, 4, 4),
        "has_multi_term_memory_patch": True,
        "guidance_cross_attn": True,
        "zero_history_timestep": True,
        "is_amplify_history": False,
    },
}
"""Class -> the fields of its configuration that make it tiny."""
LATENTS = {
    "Lumina2Transformer2DModel": 16,
    "HiDreamImageTransformer2DModel": 16,
    "LongCatImageTransformer2DModel": 16,
}
"""Denoiser -> channels of its AutoencoderKL."""
VAE_LEVELS = {"HiDreamImagePipeline": (8, 16)}
"""Pipeline -> channels of its VAE's levels, where four would make all images as large as those of
published models.
"""
CLIP_POSITIONS = {"HiDreamImagePipeline": 248}
"""Pipeline -> tokens that its CLIPs read, of which others read 77."""


def _connectors(*_: str) -> Any:
    """Return what turns all layers of a Gemma 3 of two layers into texts for video and sound."""
    sides = ("video", "audio")
    heads = {f"{side}_connector_{key}": value for side in sides for key, value in HEAD.items()}
    layers = {f"{side}_connector_num_layers": 1 for side in sides}
    registers = {f"{side}_connector_num_learnable_registers": None for side in sides}
    return LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=3,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
        **heads,
        **layers,
        **registers,
    )


def _vocoder(*_: str) -> Any:
    return LTX2Vocoder(
        in_channels=16,
        hidden_channels=32,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )


def _llama(model: str) -> Callable[[str, str], Any]:
    def build(*_: str) -> Any:
        config = transformers.LlamaConfig(
            vocab_size=len(_long_tokenizer()), num_hidden_layers=2, **ENCODER
        )
        return getattr(transformers, model)(config)

    return build


def _long_tokenizer(*_: str) -> Any:
    """Return a tokenizer in whose tokens a pipeline's own words before the prompt are short."""
    return chat_tokenizer(str(DEFAULT_PROMPT_TEMPLATE["template"]))


def _gemma2(*_: str) -> Any:
    config = transformers.Gemma2Config(
        vocab_size=len(tokenizers.gemma()), head_dim=8, num_hidden_layers=2, **ENCODER
    )
    return transformers.Gemma2Model(config)


def _kolors_unet(pipeline: str, part: str) -> Any:
    """Return a UNet that projects the states of a ChatGLM, 8 wide, before it attends to them."""
    if not pipeline.startswith("Kolors"):
        raise LookupError(f"{pipeline}: no tiny {part} (UNet2DConditionModel)")
    return denoisers.unet_sdxl(
        cross_attention_dim=WIDTH,
        encoder_hid_dim=8,
        encoder_hid_dim_type="text_proj",
        projection_class_embeddings_input_dim=6 * 8 + 8,
    )


def _qwen3_vl(*_: str) -> Any:
    return hub._qwen_vl("Qwen3VLModel", hidden=WIDTH)


def _qwen_vl_text(*_: str) -> Any:
    text = {**ENCODER, "vocab_size": len(chat_tokenizer()), "rope_parameters": MULTIMODAL_ROPE}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "num_hidden_layers": 4}
    config = transformers.Qwen2_5_VLConfig(text_config=text | ids)
    return transformers.Qwen2_5_VLTextModel(config.text_config)


def _kandinsky5(*_: str) -> Any:
    """Return a transformer whose blocks do something: a new one modulates their results to zero."""
    made = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=WIDTH,
        in_text_dim2=WIDTH,
        time_dim=16,
        model_dim=64,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=3,
        axes_dims=(4, 6, 6),
        visual_cond=False,
        attention_type="regular",
    )
    return _without_zeros(made)


def _without_zeros(denoiser: Any) -> Any:
    for parameter in denoiser.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.2)
    return denoiser


def _ernie(*_: str) -> Any:
    """Return a transformer that predicts something: the last layer of a new one is zero."""
    made = diffusers.ErnieImageTransformer2DModel(
        hidden_size=64,
        num_attention_heads=HEADS,
        num_layers=3,
        ffn_hidden_size=32,
        in_channels=64,
        out_channels=64,
        patch_size=1,
        text_in_dim=WIDTH,
        rope_axes_dim=(8, 4, 4),
        qk_layernorm=True,
    )
    return _without_zeros(made)


def _mistral3(*_: str) -> Any:
    vocabulary = max(t5_tokenizer(1).get_vocab().values()) + 1
    text = {**ENCODER, "model_type": "mistral", "vocab_size": vocabulary, "head_dim": 8}
    vision = {
        "model_type": "pixtral",
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
    }
    return transformers.Mistral3Model(
        transformers.Mistral3Config(
            text_config=text | {"num_hidden_layers": 2}, vision_config=vision
        )
    )


BUILT: Mapping[str, Callable[[str, str], Any]] = {
    "Gemma3ForConditionalGeneration": lambda *_: hub._gemma3(),
    "GemmaTokenizer": lambda *_: tokenizers.gemma(),
    "Gemma2PreTrainedModel": _gemma2,
    "LTX2TextConnectors": _connectors,
    "LTX2Vocoder": _vocoder,
    "LlamaModel": _llama("LlamaModel"),
    "LlamaForCausalLM": _llama("LlamaForCausalLM"),
    "LlamaTokenizer": _long_tokenizer,
    "TokenizersBackend": _long_tokenizer,
    "ChatGLMModel": lambda *_: hub._chat_glm(),
    "ChatGLMTokenizer": lambda *_: tokenizers.chat_glm(),
    "Kandinsky5Transformer3DModel": _kandinsky5,
    "ErnieImageTransformer2DModel": _ernie,
    "Mistral3Model": _mistral3,
    "UNet2DConditionModel": _kolors_unet,
    "Qwen3VLModel": _qwen3_vl,
    "Qwen2_5_VLTextModel": _qwen_vl_text,
    "ClassifierFreeGuidance": lambda *_: ClassifierFreeGuidance(guidance_scale=6.0),
    "HeliosScheduler": lambda *_: diffusers.HeliosScheduler(
        stage_range=[0, 1], stages=1, use_dynamic_shifting=True
    ),
    "tuple": lambda *_: (0, 1, 2),  # the layers of its text encoder that Krea 2 reads
    "ByT5Tokenizer": lambda *_: transformers.ByT5Tokenizer(),
}
"""Class named in a constructor -> (pipeline, component) -> a tiny one."""

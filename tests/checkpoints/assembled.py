"""Tiny components by class name, and pipelines put together from the types that their constructors
declare.
"""

import inspect
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import transformers

from backends.loading.processors import load_processor
from tests.checkpoints import newer, parts
from tests.checkpoints.modern import ENCODER, MULTIMODAL_ROPE
from tests.checkpoints.parts import HEADS, WIDTH
from tests.checkpoints.upstream.tokenizers import QWEN_IDS, qwen_vl
from tests.checkpoints.vocabulary import chat_tokenizer, clip_tokenizer, t5_tokenizer

HEAD = {"num_attention_heads": HEADS, "attention_head_dim": 8}
WAN = HEAD | {"text_dim": WIDTH, "freq_dim": 32, "ffn_dim": 2 * WIDTH, "num_layers": 4}
FLUX = HEAD | {"num_layers": 2, "num_single_layers": 2, "axes_dims_rope": (2, 2, 4)}
LEVELS_3D = {"block_out_channels": (8, 16), "attention_head_dim": 4, "norm_num_groups": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "ChromaTransformer2DModel": FLUX
    | {
        "joint_attention_dim": WIDTH,
        "approximator_num_channels": 8,
        "approximator_hidden_dim": WIDTH,
        "approximator_layers": 1,
    },
    "BriaTransformer2DModel": FLUX | {"joint_attention_dim": WIDTH, "in_channels": 16},
    "OvisImageTransformer2DModel": FLUX | {"joint_attention_dim": WIDTH},
    "AuraFlowTransformer2DModel": HEAD
    | {
        "sample_size": 16,
        "num_mmdit_layers": 2,
        "num_single_dit_layers": 2,
        "joint_attention_dim": WIDTH,
        "caption_projection_dim": 32,
        "pos_embed_max_size": 1024,
    },
    "CogVideoXTransformer3DModel": HEAD
    | {
        "time_embed_dim": 16,
        "text_embed_dim": WIDTH,
        "num_layers": 3,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 5,
        "max_text_seq_length": 226,
        "use_rotary_positional_embeddings": False,
    },
    "CogView3PlusTransformer2DModel": HEAD
    | {
        "num_layers": 3,
        "text_embed_dim": WIDTH,
        "time_embed_dim": 16,
        "condition_dim": 8,
        "pos_embed_max_size": 16,
        "sample_size": 16,
    },
    "LTXVideoTransformer3DModel": HEAD
    | {
        "in_channels": 8,
        "out_channels": 8,
        "cross_attention_dim": 32,
        "num_layers": 3,
        "caption_channels": WIDTH,
    },
    "MochiTransformer3DModel": HEAD
    | {
        "num_layers": 3,
        "pooled_projection_dim": 16,
        "text_embed_dim": WIDTH,
        "time_embed_dim": 16,
        "max_sequence_length": 16,
    },
    "LatteTransformer3DModel": HEAD
    | {
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 32,
        "attention_bias": True,
        "sample_size": 8,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "caption_channels": WIDTH,
        "video_length": 1,
    },
    "AllegroTransformer3DModel": HEAD
    | {
        "attention_head_dim": 24,
        "num_layers": 2,
        "cross_attention_dim": 96,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 8,
        "caption_channels": WIDTH,
    },
    "SkyReelsV2Transformer3DModel": WAN,
    "ChronoEditTransformer3DModel": WAN | {"in_channels": 36},
    "AnyFlowTransformer3DModel": WAN,
    "WanVACETransformer3DModel": WAN | {"vace_layers": [0, 2]},
    "Flux2Transformer2DModel": HEAD
    | {
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 3,
        "joint_attention_dim": 3 * WIDTH,
        "axes_dims_rope": (2, 2, 2, 2),
        "guidance_embeds": False,
    },
    "QwenImageTransformer2DModel": HEAD
    | {
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 4,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (2, 2, 4),
    },
    "AutoencoderKLQwenImage": {
        "base_dim": 8,
        "z_dim": 16,
        "dim_mult": [1, 2, 2, 2],
        "num_res_blocks": 1,
    },
    "Kandinsky3UNet": {
        "time_embedding_dim": 4,
        "groups": 2,
        "attention_head_dim": 4,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "cross_attention_dim": 4,
        "encoder_hid_dim": WIDTH,
    },
    "UNet3DConditionModel": LEVELS_3D
    | {
        "cross_attention_dim": WIDTH,
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    },
    "UNet2DModel": {
        "sample_size": 16,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "AutoencoderKLCogVideoX": {
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "temporal_compression_ratio": 4,
    },
    "AutoencoderKLLTXVideo": {
        "latent_channels": 8,
        "block_out_channels": (8, 8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8, 8),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
        "spatio_temporal_scaling": (True, True, False, False),
        "decoder_spatio_temporal_scaling": (True, True, False, False),
        "patch_size": 1,
        "encoder_causal": True,
    },
    "AutoencoderKLMochi": {
        "encoder_block_out_channels": (32, 32, 32, 32),
        "decoder_block_out_channels": (32, 32, 32, 32),
        "layers_per_block": (1, 1, 1, 1, 1),
    },
    "AutoencoderKLAllegro": {
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 2,
    },
    "AutoencoderKLWan": {
        "base_dim": 8,
        "z_dim": 16,
        "dim_mult": [1, 2, 2, 2],
        "num_res_blocks": 1,
    },
    "AutoencoderKLFlux2": {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 16, 16, 16),
        "layers_per_block": 1,
        "latent_channels": 16,
        "norm_num_groups": 4,
        "sample_size": 64,
    },
    "VQModel": {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "latent_channels": 4,
        "num_vq_embeddings": 12,
        "vq_embed_dim": 4,
        "norm_num_groups": 4,
        "norm_type": "spatial",
    },
    **newer.CONFIGS,
}
"""Class -> the fields of its configuration that make it tiny."""
LATENTS = {"ChromaTransformer2DModel": 16, "OvisImageTransformer2DModel": 16}
LATENTS |= {"CogView3PlusTransformer2DModel": 16} | newer.LATENTS
"""Denoiser -> channels of its AutoencoderKL; 4 for others."""
FIELDS: dict[str, dict[str, Any]] = {
    "LTXImageToVideoPipeline": {},
    "CogVideoXImageToVideoPipeline": {
        "in_channels": 32,
        "attention_head_dim": 16,
        "use_rotary_positional_embeddings": True,
    },
}


def assemble(name: str) -> Any:
    """Return a pipeline of this class with random weights. LookupError for an unknown component."""
    made = getattr(diffusers, name)
    found: dict[str, Any] = {}
    for part, parameter in inspect.signature(made.__init__).parameters.items():
        if part == "self" or part in ("args", "kwargs"):
            continue
        declared = str(parameter.annotation)
        has_default = parameter.default is not inspect.Parameter.empty
        if has_default and part in ("image_encoder", "feature_extractor", "transformer_2"):
            continue
        try:
            found[part] = _component(name, part, declared)
        except LookupError:
            if not has_default:
                raise
    return made(**found)


def _component(pipeline: str, part: str, declared: str) -> Any:
    classes = re.findall(r"\w+", declared)
    for class_name in classes:
        if class_name in CONFIGS:
            fields = FIELDS.get(pipeline, {}) if part in ("transformer", "unet") else {}
            return getattr(diffusers, class_name)(**(CONFIGS[class_name] | fields))
    for class_name in classes:
        if class_name in BUILT:
            return BUILT[class_name](pipeline, part)
    if pipeline.startswith("Sana") and part == "scheduler":
        return diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
    for class_name in classes:
        if class_name.endswith("Scheduler") and hasattr(diffusers, class_name):
            return getattr(diffusers, class_name)()
    raise LookupError(f"{pipeline}: no tiny {part} ({declared})")


def _vae(pipeline: str, part: str) -> Any:
    declared = str(inspect.signature(getattr(diffusers, pipeline).__init__).parameters)
    channels = next((number for each, number in LATENTS.items() if each in declared), 4)
    levels = newer.VAE_LEVELS.get(pipeline, parts.VAE_LEVELS)
    shift = 0.1 if channels == 16 else None
    return parts.vae(latent_channels=channels, channels=levels, shift_factor=shift)


def _clip_with_projection(pipeline: str, part: str) -> Any:
    positions = newer.CLIP_POSITIONS.get(pipeline, parts.CLIP_POSITIONS)
    return parts.clip_text(projection=True, positions=positions)


def _umt5(pipeline: str, part: str) -> Any:
    config = transformers.UMT5Config(
        vocab_size=max(t5_tokenizer(1).get_vocab().values()) + 1,
        d_model=WIDTH,
        d_kv=8,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=HEADS,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return transformers.UMT5EncoderModel(config)


def _qwen3(model: str, layers: int) -> Callable[[str, str], Any]:
    def build(pipeline: str, part: str) -> Any:
        config = transformers.Qwen3Config(
            vocab_size=len(chat_tokenizer()), head_dim=8, num_hidden_layers=layers, **ENCODER
        )
        return getattr(transformers, model)(config)

    return build


def _qwen_vl(pipeline: str, part: str) -> Any:
    text = {
        **ENCODER,
        "vocab_size": max(QWEN_IDS.values()) + 1,
        "num_hidden_layers": 2,
        "rope_parameters": MULTIMODAL_ROPE,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "depth": 1,
        "num_heads": HEADS,
        "out_hidden_size": WIDTH,
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _qwen_vl_processor(pipeline: str, part: str) -> Any:
    """Return a processor as a folder without torchvision gives it, for images of 56 x 56 pixels."""
    sides = {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}
    with tempfile.TemporaryDirectory() as folder:
        transformers.Qwen2VLImageProcessorPil(size=sides).save_pretrained(folder)
        qwen_vl().save_pretrained(folder)
        return load_processor(Path(folder), "Qwen2VLProcessor")


BUILT: dict[str, Callable[[str, str], Any]] = {
    "AutoencoderKL": _vae,
    "T5EncoderModel": lambda *_: parts.t5_text(),
    "UMT5EncoderModel": _umt5,
    "CLIPTextModel": lambda *_: parts.clip_text(),
    "CLIPTextModelWithProjection": _clip_with_projection,
    "CLIPVisionModelWithProjection": lambda *_: parts.clip_vision(),
    "CLIPVisionModel": lambda *_: transformers.CLIPVisionModel(parts.clip_vision().config),
    "CLIPImageProcessor": lambda *_: parts.image_processor(),
    "CLIPImageProcessorPil": lambda *_: parts.image_processor(),
    "Qwen3Model": _qwen3("Qwen3Model", 2),
    "Qwen3ForCausalLM": _qwen3("Qwen3ForCausalLM", 28),
    "Qwen2_5_VLForConditionalGeneration": _qwen_vl,
    "Qwen2VLProcessor": _qwen_vl_processor,
    "T5Tokenizer": lambda *_: t5_tokenizer(77),
    "T5TokenizerFast": lambda *_: t5_tokenizer(77),
    "AutoTokenizer": lambda *_: t5_tokenizer(77),
    "CLIPTokenizer": lambda *_: clip_tokenizer(),
    "Qwen2Tokenizer": lambda *_: chat_tokenizer(),
    "Qwen2TokenizerFast": lambda *_: chat_tokenizer(),
    "KarrasDiffusionSchedulers": lambda *_: diffusers.DDIMScheduler(),
    "bool": lambda *_: False,
    **newer.BUILT,
}
"""Class named in a constructor -> (pipeline, component) -> a tiny one."""

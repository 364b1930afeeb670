"""Tiny checkpoints of the newer transformers: Z-Image, Qwen-Image, FLUX.2 and Wan. Their text
encoders are language models.

Keywords replace fields of the denoiser's config, as in denoisers.py.
"""

from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.checkpoints import parts
from tests.checkpoints.parts import HEADS, WIDTH
from tests.checkpoints.vocabulary import chat_tokenizer, t5_tokenizer

ENCODER = {
    "initializer_range": 0.2,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
}
MULTIMODAL_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def zimage(**config: object) -> DiffusionPipeline:
    """The scheduler is that of the published checkpoints: static shift."""
    num_tokens = len(chat_tokenizer())
    fields = {
        "dim": 32,
        "n_layers": 4,
        "n_refiner_layers": 1,
        "n_heads": HEADS,
        "n_kv_heads": HEADS,
        "cap_feat_dim": WIDTH,
    }
    transformer = ZImageTransformer2DModel(
        **(fields | {"axes_dims": [2, 2, 4], "axes_lens": [1024, 64, 64]} | config)
    )
    for pad_token in (transformer.x_pad_token, transformer.cap_pad_token):
        # zeros, as the class makes them, would hide a token that is left out
        pad_token.data.normal_()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=Qwen3Model(
            Qwen3Config(vocab_size=num_tokens, head_dim=8, num_hidden_layers=2, **ENCODER)
        ),
        tokenizer=chat_tokenizer(),
        transformer=transformer,
    )


def qwenimage(**config: object) -> DiffusionPipeline:
    num_tokens = len(chat_tokenizer())
    fields = {
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 4,
        "num_attention_heads": HEADS,
        "attention_head_dim": 8,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "depth": 1,
        "num_heads": HEADS,
        "out_hidden_size": WIDTH,
    }
    text = {
        "vocab_size": num_tokens,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "num_hidden_layers": 2,
        "rope_parameters": MULTIMODAL_ROPE,
        **ENCODER,
    }
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        ),
        tokenizer=chat_tokenizer(),
        transformer=QwenImageTransformer2DModel(
            **(fields | {"joint_attention_dim": WIDTH, "axes_dims_rope": (2, 2, 4)} | config)
        ),
    )


def flux2(**config: object) -> DiffusionPipeline:
    """The pipeline takes layers 10, 20 and 30 of its text encoder. The tokenizer stands in for the
    processor of text and images.
    """
    tokenizer = chat_tokenizer(SYSTEM_MESSAGE)
    text = {
        "model_type": "mistral",
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 31,
        "head_dim": 8,
        **ENCODER,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
    }
    fields = {
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 4,
        "num_attention_heads": HEADS,
        "attention_head_dim": 8,
    }
    fields |= {"joint_attention_dim": 3 * WIDTH, "axes_dims_rope": (2, 2, 2, 2)}
    return Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 16, 16, 16),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
            sample_size=64,
        ),
        text_encoder=Mistral3ForConditionalGeneration(
            Mistral3Config(text_config=text, vision_config=vision)
        ),
        tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel(**(fields | config)),
    )


def wan_t2v(**config: object) -> DiffusionPipeline:
    fields = {
        "num_attention_heads": HEADS,
        "attention_head_dim": 8,
        "text_dim": WIDTH,
        "freq_dim": 32,
        "ffn_dim": 2 * WIDTH,
    }
    encoder = UMT5Config(
        vocab_size=max(t5_tokenizer(1).get_vocab().values()) + 1,
        d_model=WIDTH,
        d_kv=8,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=HEADS,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return WanPipeline(
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1),
        text_encoder=UMT5EncoderModel(encoder),
        tokenizer=t5_tokenizer(512),
        transformer=WanTransformer3DModel(**(fields | {"num_layers": 4} | config)),
    )

"""Folders in place of the small models on a hub that diffusers' tests name."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import transformers

from tests.checkpoints import parts
from tests.checkpoints.cache import cached
from tests.checkpoints.parts import WIDTH
from tests.checkpoints.saving import save
from tests.checkpoints.upstream import tokenizers

Saved = Any
"""A model, tokenizer, processor or configuration of transformers."""


def stand_in_hub() -> Path:
    """Return a folder in which names of a hub are folders."""
    source = Path(__file__).read_text("utf-8") + Path(tokenizers.__file__).read_text("utf-8")
    return cached("upstream-hub", {"source": source}, _build)


def _build(root: Path) -> None:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, builders in REPOSITORIES.items():
            for build in builders:
                save(build(), root / name)


def _decoder(model: str, *, hidden: int, layers: int = 2, **fields: object) -> Saved:
    """Return a language model of this class, as wide as the tests expect."""
    made = getattr(transformers, model)
    config = made.config_class(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        **fields,
    )
    return made(config)


def _umt5() -> Saved:
    config = transformers.UMT5Config(
        vocab_size=1200,
        d_model=WIDTH,
        d_kv=8,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=4,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return transformers.UMT5EncoderModel(config)


def _unet() -> Saved:
    return diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def _bert() -> Saved:
    config = parts.bert_text().config
    return transformers.BertModel(config)


def _qwen_vl(model: str, *, hidden: int) -> Saved:
    made = getattr(transformers, model)
    text = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": tokenizers.QWEN_IDS["<|video_pad|>"] + 1,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [1, 1, 2],
            "rope_theta": 10000.0,
        },
    }
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": hidden,
        "num_heads": 4,
        "out_hidden_size": hidden,
        "patch_size": 14,
        "deepstack_visual_indexes": [0],
        "intermediate_size": 32,
    }
    return made(made.config_class(text_config=text, vision_config=vision))


def _qwen_images() -> Saved:
    return transformers.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    )


def _gemma3() -> Saved:
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": len(tokenizers.gemma()),
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _chat_glm() -> Saved:
    """Return Kolors' text encoder, whose constructor leaves memory as it was."""
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=len(tokenizers.chat_glm()),
        hidden_size=8,
        ffn_hidden_size=8,
        kv_channels=4,
        num_attention_heads=2,
        seq_length=256,
        multi_query_attention=False,
        add_qkv_bias=True,
        rmsnorm=True,
    )
    config.original_rope = True
    made = ChatGLMModel(config)
    for name, parameter in made.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.2)
        else:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
    return made


def _siglip() -> Saved:
    config = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=30,
        patch_size=15,
    )
    return transformers.SiglipVisionModel(config)


TINY = "hf-internal-testing/tiny-random-"
REPOSITORIES: Mapping[str, tuple[Callable[[], Saved], ...]] = {
    TINY + "clip": (tokenizers.clip_tokenizer,),
    TINY + "t5": (lambda: tokenizers.t5_tokenizer(512), parts.t5_text),
    TINY + "umt5": (_umt5,),
    TINY + "BertModel": (tokenizers.bert_tokenizer, _bert),
    TINY + "LlamaForCausalLM": (
        tokenizers.llama,
        lambda: _decoder("LlamaForCausalLM", hidden=16, vocab_size=len(tokenizers.llama())),
    ),
    TINY + "Qwen2VLForConditionalGeneration": (
        _qwen_images,
        tokenizers.qwen_vl,
        lambda: _qwen_vl("Qwen2VLForConditionalGeneration", hidden=16),
    ),
    "huangfeice/tiny-random-Qwen3VLForConditionalGeneration": (
        _qwen_images,
        lambda: tokenizers.qwen_vl(is_dense=True),
        lambda: _qwen_vl("Qwen3VLForConditionalGeneration", hidden=16),
    ),
    TINY + "SiglipVisionModel": (
        _siglip,
        lambda: transformers.SiglipImageProcessor(size={"height": 30, "width": 30}),
    ),
    TINY + "DPTForDepthEstimation": (
        lambda: transformers.DPTImageProcessor(size={"height": 32, "width": 32}),
    ),
    TINY + "chatglm3-6b": (tokenizers.chat_glm, _chat_glm),
    "hf-internal-testing/dummy-gemma": (tokenizers.smallest_gemma,),
    "hf-internal-testing/tiny-gemma3": (tokenizers.gemma, _gemma3),
    "hf-internal-testing/llama-tokenizer": (tokenizers.llama,),
    "hf-internal-testing/Mistral-Small-3.1-24B-Instruct-2503-only-processor": (tokenizers.qwen_vl,),
    "hf-internal-testing/tiny-cosmos3-modular-pipe/text_tokenizer": (tokenizers.qwen_vl,),
    "finetrainers/dummy-hunyaunvideo/tokenizer": (tokenizers.llama,),
    "YiYiXu/tiny-random-mclip-base": (tokenizers.xlm_roberta,),
    "THUDM/glm-4-9b-chat": (tokenizers.chat_tokenizer,),
    "diffusers/consistency-models-test/test_unet": (_unet,),
    "zai-org/GLM-Image/processor": (
        lambda: transformers.GlmImageImageProcessorPil(patch_size=8),
        tokenizers.glm_image,
    ),
}
"""Name on the hub, with the subfolder -> what is in it."""

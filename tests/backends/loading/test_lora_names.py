"""Whatever a trainer calls a layer, its LoRA acts on that layer of diffusers; what has no layer is
refused by name.
"""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backends.generation.pipeline import LoadedPipeline
from tests.backends.loading.lora_files import Keys, factors, layer_of, require_same, write

STYLES = {
    "kohya": ("lora_down.weight", "lora_up.weight"),
    "peft": ("lora_A.weight", "lora_B.weight"),
    "default": ("lora_A.default.weight", "lora_B.default.weight"),
    "old": ("lora.down.weight", "lora.up.weight"),
    "processor": None,
}
Q, K, V = "to_q", "to_k", "to_v"

UNET = "unet.down_blocks.1.attentions.0.transformer_blocks.0"
MMDIT = "transformer.transformer_blocks.0"
SINGLE = "transformer.single_transformer_blocks.0"
WAN = "transformer.blocks.0"
Z = "transformer.layers.0.attention"
POOLER = "transformer.time_extra_emb.pooler"
CLIP = "text_encoder.encoder.layers.0.self_attn"

NAMES: list[tuple[str, str, str, dict[str, list[str]]]] = [
    (
        "sdxl",
        "kohya's, of the original blocks",
        "kohya",
        {
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_v": [f"{UNET}.attn1.to_v"],
            "lora_unet_input_blocks_4_1_proj_in": ["unet.down_blocks.1.attentions.0.proj_in"],
            "lora_unet_input_blocks_1_0_in_layers_2": ["unet.down_blocks.0.resnets.0.conv1"],
            "lora_unet_input_blocks_1_0_emb_layers_1": [
                "unet.down_blocks.0.resnets.0.time_emb_proj"
            ],
            "lora_unet_middle_block_2_out_layers_3": ["unet.mid_block.resnets.1.conv2"],
            "lora_unet_time_embed_0": ["unet.time_embedding.linear_1"],
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": [f"{CLIP}.q_proj"],
            "lora_te2_text_model_encoder_layers_0_mlp_fc1": [
                "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"
            ],
        },
    ),
    (
        "sdxl",
        "OneTrainer's and SimpleTuner's",
        "kohya",
        {
            "lycoris_down_blocks_1_attentions_0_proj_out": [
                "unet.down_blocks.1.attentions.0.proj_out"
            ]
        },
    ),
    (
        "sdxl",
        "peft's",
        "peft",
        {f"base_model.model.{UNET.removeprefix('unet.')}.attn1.to_v": [f"{UNET}.attn1.to_v"]},
    ),
    (
        "sdxl",
        "ComfyUI's",
        "kohya",
        {
            "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_v": [
                f"{UNET}.attn1.to_v"
            ],
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.v_proj": [
                f"{CLIP}.v_proj"
            ],
        },
    ),
    (
        "sdxl",
        "diffusers', with the old names of the encoders' layers",
        "old",
        {
            f"{UNET}.attn1.processor.to_v": [f"{UNET}.attn1.to_v"],
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": [f"{CLIP}.q_proj"],
            "text_encoder_2.text_model.encoder.layers.0.self_attn.out_proj": [
                "text_encoder_2.text_model.encoder.layers.0.self_attn.out_proj"
            ],
        },
    ),
    (
        "sd2",
        "kohya's",
        "kohya",
        {
            "lora_unet_down_blocks_0_attentions_0_proj_out": [
                "unet.down_blocks.0.attentions.0.proj_out"
            ],
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v": [
                "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
            ],
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj": [f"{CLIP}.q_proj"],
        },
    ),
    (
        "sd1",
        "diffusers' first",
        "processor",
        {
            f"{UNET}.attn1.processor.to_v": [f"{UNET}.attn1.to_v"],
            f"{UNET}.attn2.processor.to_out": [f"{UNET}.attn2.to_out.0"],
        },
    ),
    (
        "flux",
        "kohya's",
        "kohya",
        {
            "lora_unet_double_blocks_0_img_attn_qkv": [
                f"{MMDIT}.attn.{name}" for name in (Q, K, V)
            ],
            "lora_unet_double_blocks_0_txt_mlp_2": [f"{MMDIT}.ff_context.net.2"],
            "lora_unet_single_blocks_0_linear1": [
                *(f"{SINGLE}.attn.{name}" for name in (Q, K, V)),
                f"{SINGLE}.proj_mlp",
            ],
            "lora_unet_final_layer_adaLN_modulation_1": ["~transformer.norm_out.linear"],
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": [f"{CLIP}.q_proj"],
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q": [
                "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"
            ],
        },
    ),
    (
        "flux",
        "ComfyUI's and those of the original",
        "peft",
        {
            "diffusion_model.double_blocks.0.img_attn.qkv": [
                f"{MMDIT}.attn.{name}" for name in (Q, K, V)
            ],
            "base_model.model.single_blocks.0.linear2": [f"{SINGLE}.proj_out"],
            "vector_in.out_layer": ["transformer.time_text_embed.text_embedder.linear_2"],
            "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q": [
                "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"
            ],
        },
    ),
    (
        "flux",
        "SimpleTuner's LyCORIS",
        "kohya",
        {"lycoris_transformer_blocks_0_attn_to_q": [f"{MMDIT}.attn.to_q"]},
    ),
    (
        "flux",
        "OneTrainer's",
        "kohya",
        {
            "lora_transformer_single_transformer_blocks_0_proj_out": [f"{SINGLE}.proj_out"],
            "transformer.x_embedder": ["transformer.x_embedder"],
        },
    ),
    (
        "flux",
        "XLabs'",
        "processor",
        {
            "double_blocks.0.processor.qkv1": [f"{MMDIT}.attn.{name}" for name in (Q, K, V)],
            "double_blocks.0.processor.proj2": [f"{MMDIT}.attn.to_add_out"],
        },
    ),
    ("flux", "ai-toolkit's", "peft", {f"{MMDIT}.ff.net.0.proj": [f"{MMDIT}.ff.net.0.proj"]}),
    (
        "flux2",
        "ai-toolkit's",
        "peft",
        {
            "diffusion_model.double_blocks.0.img_attn.qkv": [
                f"{MMDIT}.attn.{name}" for name in (Q, K, V)
            ],
            "diffusion_model.single_blocks.0.linear1": [f"{SINGLE}.attn.to_qkv_mlp_proj"],
            "diffusion_model.img_in": ["transformer.x_embedder"],
        },
    ),
    (
        "flux2",
        "musubi's",
        "kohya",
        {
            "lora_unet_double_blocks_0_txt_attn_qkv": [
                f"{MMDIT}.attn.add_{name}_proj" for name in "qkv"
            ],
            "lora_unet_single_blocks_0_linear2": [f"{SINGLE}.attn.to_out"],
        },
    ),
    (
        "sd3",
        "OneTrainer's, with all encoders",
        "kohya",
        {
            "lora_transformer_transformer_blocks_0_attn_to_q": [f"{MMDIT}.attn.to_q"],
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": [
                "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
            ],
            "lora_te2_text_model_encoder_layers_0_self_attn_v_proj": [
                "text_encoder_2.text_model.encoder.layers.0.self_attn.v_proj"
            ],
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q": [
                "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q"
            ],
        },
    ),
    (
        "sd3",
        "ComfyUI's",
        "peft",
        {
            "diffusion_model.joint_blocks.0.x_block.attn.qkv": [
                f"{MMDIT}.attn.{name}" for name in (Q, K, V)
            ],
            "text_encoders.clip_g.transformer.text_model.encoder.layers.0.self_attn.q_proj": [
                "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"
            ],
        },
    ),
    (
        "sd3",
        "kohya's",
        "kohya",
        {
            "lora_unet_joint_blocks_0_context_block_attn_qkv": [
                f"{MMDIT}.attn.add_{name}_proj" for name in "qkv"
            ],
            "lora_unet_joint_blocks_0_x_block_mlp_fc1": [f"{MMDIT}.ff.net.0.proj"],
            "lora_unet_joint_blocks_0_context_block_adaLN_modulation_1": [
                f"{MMDIT}.norm1_context.linear"
            ],
            "lora_unet_final_layer_adaLN_modulation_1": ["~transformer.norm_out.linear"],
        },
    ),
    (
        "wan_t2v",
        "DiffSynth's",
        "default",
        {
            "blocks.0.self_attn.q": [f"{WAN}.attn1.to_q"],
            "blocks.0.cross_attn.o": [f"{WAN}.attn2.to_out.0"],
            "blocks.0.ffn.0": [f"{WAN}.ffn.net.0.proj"],
        },
    ),
    (
        "wan_t2v",
        "ai-toolkit's",
        "peft",
        {
            "diffusion_model.blocks.0.self_attn.k": [f"{WAN}.attn1.to_k"],
            "diffusion_model.blocks.0.cross_attn.v": [f"{WAN}.attn2.to_v"],
        },
    ),
    (
        "wan_t2v",
        "diffusers' and SimpleTuner's",
        "peft",
        {"transformer.blocks.0.attn1.to_out.0": [f"{WAN}.attn1.to_out.0"]},
    ),
    (
        "wan_t2v",
        "musubi's, a part of the layers",
        "kohya",
        {"lora_unet_blocks_0_self_attn_v": [f"{WAN}.attn1.to_v"]},
    ),
    (
        "wan_t2v",
        "lightx2v's",
        "kohya",
        {
            "diffusion_model.time_embedding.2": [
                "transformer.condition_embedder.time_embedder.linear_2"
            ],
            "diffusion_model.head.head": ["transformer.proj_out"],
        },
    ),
    (
        "zimage",
        "kohya's",
        "kohya",
        {
            "lora_unet_layers_0_attention_qkv": [f"{Z}.{name}" for name in (Q, K, V)],
            "lora_unet_layers_0_attention_out": [f"{Z}.to_out.0"],
        },
    ),
    (
        "zimage",
        "ai-toolkit's",
        "peft",
        {
            "diffusion_model.layers.0.attention.to_v": [f"{Z}.to_v"],
            "diffusion_model.layers.0.feed_forward.w2": ["transformer.layers.0.feed_forward.w2"],
        },
    ),
    (
        "zimage",
        "DiffSynth's",
        "default",
        {
            "pipe.dit.layers.0.attention.to_q": [f"{Z}.to_q"],
            "layers.0.attention.to_k": [f"{Z}.to_k"],
        },
    ),
    (
        "zimage",
        "OneTrainer's",
        "kohya",
        {"lora_transformer_layers_0_attention_to_out_0": [f"{Z}.to_out.0"]},
    ),
    (
        "qwenimage",
        "lightx2v's",
        "kohya",
        {"transformer_blocks.0.attn.to_v": [f"{MMDIT}.attn.to_v"]},
    ),
    (
        "qwenimage",
        "ai-toolkit's and ComfyUI's",
        "peft",
        {
            "diffusion_model.transformer_blocks.0.img_mlp.net.2": [f"{MMDIT}.img_mlp.net.2"],
            "transformer.transformer_blocks.0.attn.to_k": [f"{MMDIT}.attn.to_k"],
        },
    ),
    (
        "qwenimage",
        "musubi's",
        "kohya",
        {
            "lora_unet_transformer_blocks_0_attn_to_out_0": [f"{MMDIT}.attn.to_out.0"],
            "lora_unet_transformer_blocks_0_img_mod_1": [f"{MMDIT}.img_mod.1"],
        },
    ),
    (
        "qwenimage",
        "DiffSynth's",
        "default",
        {"transformer_blocks.0.attn.add_q_proj": [f"{MMDIT}.attn.add_q_proj"]},
    ),
    (
        "hy",
        "of the original",
        "kohya",
        {
            "lora_unet_blocks_0_attn1_Wqkv": [f"{WAN}.attn1.{name}" for name in (Q, K, V)],
            "lora_unet_blocks_0_mlp_fc2": [f"{WAN}.ff.net.2"],
        },
    ),
    (
        "hy",
        "whose pooling reads weights",
        "peft",
        {"transformer.time_extra_emb.pooler.v_proj": ["transformer.time_extra_emb.pooler.v_proj"]},
    ),
    (
        "pixs",
        "kohya's and SimpleTuner's",
        "kohya",
        {
            "lora_unet_transformer_blocks_0_attn1_to_v": [f"{MMDIT}.attn1.to_v"],
            "lycoris_caption_projection_linear_1": ["transformer.caption_projection.linear_1"],
            "lora_te_encoder_block_0_layer_0_SelfAttention_q": [
                "text_encoder.encoder.block.0.layer.0.SelfAttention.q"
            ],
        },
    ),
    (
        "pixs",
        "of the original",
        "peft",
        {
            "base_model.model.blocks.0.cross_attn.kv_linear": [
                f"{MMDIT}.attn2.to_k",
                f"{MMDIT}.attn2.to_v",
            ]
        },
    ),
]


def keys_of(style: str, layer: str, down: Tensor, up: Tensor) -> Keys:
    if STYLES[style] is not None:
        return dict(zip((f"{layer}.{name}" for name in STYLES[style]), (down, up), strict=True))
    name, number = re.fullmatch(r"(.*?)(\d?)", layer).groups()
    return {f"{name}_lora{number}.down.weight": down, f"{name}_lora{number}.up.weight": up}


def file_and_changes(
    pipe: LoadedPipeline, style: str, names: dict[str, list[str]]
) -> tuple[Keys, dict[str, Tensor]]:
    keys: Keys = {}
    changes: dict[str, Tensor] = {}
    for number, (theirs, ours) in enumerate(names.items()):
        weights = [layer_of(pipe, name.removeprefix("~")).weight for name in ours]
        down, up = factors(number, sum(len(weight) for weight in weights), weights[0][0].numel(), 3)
        is_conv = weights[0].dim() == 4
        shaped = down.view(3, *weights[0].shape[1:]) if is_conv else down
        keys |= keys_of(style, theirs, shaped, up[..., None, None] if is_conv else up)
        for name, change in zip(
            ours, (up @ down).split([len(weight) for weight in weights]), strict=True
        ):
            changes[name.removeprefix("~")] = (
                torch.cat(change.chunk(2)[::-1]) if name.startswith("~") else change
            )
    return keys, changes


@pytest.mark.parametrize(
    ("name", "trainer", "style", "names"),
    NAMES,
    ids=[f"{name}, {trainer}" for name, trainer, _, _ in NAMES],
)
def test_names_mean_the_layers(
    pipes, tmp_path: Path, name: str, trainer: str, style: str, names: dict[str, list[str]]
) -> None:
    keys, changes = file_and_changes(pipes(name), style, names)
    require_same(pipes(name), write(tmp_path / "x.safetensors", keys), changes)


def test_lightx2vs_differences_of_norms_and_modulations_act(pipes, tmp_path: Path) -> None:
    pipe = pipes("wan_t2v")
    changes = {
        f"{WAN}.norm2:weight": torch.linspace(-1, 1, 32),
        f"{WAN}.norm2:bias": torch.linspace(-1, 1, 32),
    }
    changes |= {
        f"{WAN}.attn1.norm_q:weight": torch.linspace(-1, 1, 32),
        f"{WAN}.attn1.to_v:bias": torch.linspace(-1, 1, 32),
    }
    changes[f"{WAN}:scale_shift_table"] = torch.linspace(-1, 1, 6 * 32)
    names = ["norm3.diff", "norm3.diff_b", "self_attn.norm_q.diff", "self_attn.v.diff_b", "diff_m"]
    keys = {
        f"diffusion_model.blocks.0.{name}": change.clone()
        for name, change in zip(names, changes.values(), strict=True)
    }
    keys["diffusion_model.blocks.0.diff_m"] = keys["diffusion_model.blocks.0.diff_m"].view(1, 6, 32)
    require_same(pipe, write(tmp_path / "x.safetensors", keys), changes)

"""LoRAs for types that are like another one, in the names that are published for them: each equals
weights merged by hand.
"""

from pathlib import Path

import pytest

from tests.backends.loading.lora_files import require_same, write
from tests.backends.loading.test_lora_names import MMDIT, SINGLE, WAN, K, Q, V, file_and_changes

FLUX = {
    "kohya": {
        "lora_unet_double_blocks_0_img_attn_qkv": [f"{MMDIT}.attn.{name}" for name in (Q, K, V)],
        "lora_unet_double_blocks_0_txt_mlp_2": [f"{MMDIT}.ff_context.net.2"],
        "lora_unet_single_blocks_0_linear1": [
            *(f"{SINGLE}.attn.{name}" for name in (Q, K, V)),
            f"{SINGLE}.proj_mlp",
        ],
        "lora_unet_single_blocks_0_linear2": [f"{SINGLE}.proj_out"],
    },
    "comfyui": {
        "diffusion_model.double_blocks.0.img_attn.proj": [f"{MMDIT}.attn.to_out.0"],
        "diffusion_model.double_blocks.0.img_mlp.0": [f"{MMDIT}.ff.net.0.proj"],
        "diffusion_model.single_blocks.0.linear2": [f"{SINGLE}.proj_out"],
    },
    "diffusers": {
        f"{MMDIT}.attn.to_q": [f"{MMDIT}.attn.to_q"],
        f"{SINGLE}.proj_mlp": [f"{SINGLE}.proj_mlp"],
    },
}
CHROMA = {
    **FLUX,
    "comfyui": {
        **FLUX["comfyui"],
        "diffusion_model.img_in": ["transformer.x_embedder"],
        "diffusion_model.distilled_guidance_layer.in_proj": [
            "transformer.distilled_guidance_layer.in_proj"
        ],
        "diffusion_model.distilled_guidance_layer.layers.0.out_layer": [
            "transformer.distilled_guidance_layer.layers.0.linear_2"
        ],
    },
}
FLUX2 = {
    "kohya": {
        "lora_unet_double_blocks_0_txt_attn_qkv": [
            f"{MMDIT}.attn.add_{name}_proj" for name in "qkv"
        ],
        "lora_unet_single_blocks_0_linear2": [f"{SINGLE}.attn.to_out"],
    },
    "comfyui": {
        "diffusion_model.double_blocks.0.img_attn.qkv": [
            f"{MMDIT}.attn.{name}" for name in (Q, K, V)
        ],
        "diffusion_model.single_blocks.0.linear1": [f"{SINGLE}.attn.to_qkv_mlp_proj"],
    },
    "diffusers": {f"{MMDIT}.attn.to_v": [f"{MMDIT}.attn.to_v"]},
}
OWN = {
    "kohya": {
        "lora_unet_transformer_blocks_0_attn_to_v": [f"{MMDIT}.attn.to_v"],
        "lora_transformer_single_transformer_blocks_0_attn_to_k": [f"{SINGLE}.attn.to_k"],
    },
    "comfyui": {"diffusion_model.transformer_blocks.0.attn.to_q": [f"{MMDIT}.attn.to_q"]},
    "diffusers": {
        f"{MMDIT}.attn.to_out.0": [f"{MMDIT}.attn.to_out.0"],
        f"{SINGLE}.attn.to_v": [f"{SINGLE}.attn.to_v"],
    },
}
QWEN = {
    "kohya": {
        "lora_unet_transformer_blocks_0_attn_to_out_0": [f"{MMDIT}.attn.to_out.0"],
        "transformer_blocks.0.attn.to_v": [f"{MMDIT}.attn.to_v"],
    },
    "comfyui": {
        "diffusion_model.transformer_blocks.0.img_mlp.net.2": [f"{MMDIT}.img_mlp.net.2"],
    },
    "diffusers": {f"{MMDIT}.attn.add_q_proj": [f"{MMDIT}.attn.add_q_proj"]},
}
WAN_NAMES = {
    "kohya": {"lora_unet_blocks_0_self_attn_v": [f"{WAN}.attn1.to_v"]},
    "comfyui": {
        "diffusion_model.blocks.0.cross_attn.v": [f"{WAN}.attn2.to_v"],
        "diffusion_model.blocks.0.ffn.0": [f"{WAN}.ffn.net.0.proj"],
    },
    "diffusers": {"transformer.blocks.0.attn1.to_out.0": [f"{WAN}.attn1.to_out.0"]},
}
HUNYUAN_VIDEO = {
    "kohya": {
        "lora_unet_double_blocks_0_img_attn_qkv": [f"{MMDIT}.attn.{name}" for name in (Q, K, V)],
        "lora_unet_double_blocks_0_txt_mlp_fc2": [f"{MMDIT}.ff_context.net.2"],
        "lora_unet_single_blocks_0_linear1": FLUX["kohya"]["lora_unet_single_blocks_0_linear1"],
        "lora_unet_single_blocks_0_modulation_linear": [f"{SINGLE}.norm.linear"],
    },
    "comfyui": {
        "diffusion_model.double_blocks.0.img_attn_proj": [f"{MMDIT}.attn.to_out.0"],
        "diffusion_model.double_blocks.0.img_mod.linear": [f"{MMDIT}.norm1.linear"],
        "diffusion_model.single_blocks.0.linear2": [f"{SINGLE}.proj_out"],
    },
    "diffusers": FLUX["diffusers"],
}
ROWS = {
    "flux_kontext": FLUX,
    "flux_fill": FLUX,
    "chroma": CHROMA,
    "ovis": OWN,
    "bria": OWN,
    "flux2_klein": FLUX2,
    "qwenimage_edit": QWEN,
    "wan_i2v": WAN_NAMES,
    "hunyuanvideo": HUNYUAN_VIDEO,
}
STYLES = {"kohya": "kohya", "comfyui": "peft", "diffusers": "peft"}


@pytest.mark.parametrize(
    ("name", "trainer"), [(name, trainer) for name, names in ROWS.items() for trainer in names]
)
def test_published_names_mean_the_layers(pipes, tmp_path: Path, name: str, trainer: str) -> None:
    keys, changes = file_and_changes(pipes(name), STYLES[trainer], ROWS[name][trainer])
    require_same(pipes(name), write(tmp_path / "x.safetensors", keys), changes)


def of_second(changes):
    return {f"transformer_2.{name.partition('.')[2]}": value for name, value in changes.items()}


FILES = {
    "style_high_noise": "first",
    "Wan2.2-Style-LowNoise-v2": "second",
    "low_noise_model": "second",
    "style-HIGH": "first",
    "style_low_v1.1": "second",
    "slow motion": "both",
    "highlights": "both",
}


@pytest.mark.parametrize(
    ("name", "trainer", "file"),
    [
        *(("wan22_t2v", "kohya", file) for file in FILES),
        *(("wan22_t2v", trainer, "low_noise_model") for trainer in ("comfyui", "diffusers")),
        *(("wan22_i2v", trainer, "slow motion") for trainer in WAN_NAMES),
    ],
)
def test_file_of_wan22_is_for_the_denoiser_that_its_name_says(
    pipes, tmp_path: Path, name: str, trainer: str, file: str
) -> None:
    keys, changes = file_and_changes(pipes(name), STYLES[trainer], WAN_NAMES[trainer])
    wanted = {
        "first": changes,
        "second": of_second(changes),
        "both": {**changes, **of_second(changes)},
    }
    require_same(pipes(name), write(tmp_path / f"{file}.safetensors", keys), wanted[FILES[file]])


def test_file_with_both_denoisers_of_wan22_is_for_each_as_it_says(pipes, tmp_path: Path) -> None:
    pipe = pipes("wan22_t2v")
    keys, changes = file_and_changes(
        pipe,
        "peft",
        {
            "transformer.blocks.0.attn1.to_v": [f"{WAN}.attn1.to_v"],
            "transformer_2.blocks.0.attn2.to_v": ["transformer_2.blocks.0.attn2.to_v"],
        },
    )
    require_same(pipe, write(tmp_path / "x.safetensors", keys), changes)

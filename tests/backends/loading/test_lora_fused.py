"""Every format acts on a layer that the original model fuses and diffusers splits."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.backends.loading.lora_files import Keys, factors, layer_of, require_same, write

BLOCK, SINGLE = "transformer.transformer_blocks.0", "transformer.single_transformer_blocks.0"
QKV = ("to_q", "to_k", "to_v")


def under(prefix: str, *names: str) -> list[str]:
    return [f"{prefix}.{name}" for name in names]


FUSED = [
    ("flux", "lora_unet_double_blocks_0_img_attn_qkv", under(f"{BLOCK}.attn", *QKV)),
    ("flux", "diffusion_model.single_blocks.0.linear1",
     [*under(f"{SINGLE}.attn", *QKV), f"{SINGLE}.proj_mlp"]),
    ("flux2", "diffusion_model.double_blocks.0.img_attn.qkv", under(f"{BLOCK}.attn", *QKV)),
    ("sd3", "lora_unet_joint_blocks_0_x_block_attn_qkv", under(f"{BLOCK}.attn", *QKV)),
    ("zimage", "diffusion_model.layers.0.attention.qkv",
     under("transformer.layers.0.attention", *QKV)),
    ("hy", "lora_unet_blocks_0_attn1_Wqkv", under("transformer.blocks.0.attn1", *QKV)),
    ("pixs", "blocks.0.cross_attn.kv_linear", under(f"{BLOCK}.attn2", "to_k", "to_v")),
]  # fmt: skip
FORMATS = ("lora", "loha", "lokr", "full", "dora")


def made(kind: str, weight: Tensor) -> tuple[Keys, Tensor]:
    """One format's tensors for the fused weight (out, in), and its change."""
    out, num_in = weight.shape
    down, up = factors(1, out, num_in, 4)
    match kind:
        case "lora":
            keys = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
            return keys, up @ down / 2
        case "loha":
            other_down, other_up = factors(2, out, num_in, 4)
            keys = {"hada_w1_a": up, "hada_w1_b": down}
            keys |= {"hada_w2_a": 24 * other_up, "hada_w2_b": other_down}
            change = 24 * (up @ down) * (other_up @ other_down)
            return {**keys, "alpha": torch.tensor(1.0)}, change / 4
        case "lokr":
            right_down, right_up = factors(3, out // 2, num_in // 2, 4)
            left = torch.tensor([[1.0, -0.5], [0.3, 0.8]])
            right = right_up @ right_down
            return {"lokr_w1": left, "lokr_w2": right}, torch.kron(left, right)
        case "full":
            return {"diff": up @ down}, up @ down
        case "dora":
            changed = weight + up @ down
            magnitude = torch.linspace(0.5, 2, out)[:, None]
            keys = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": magnitude}
            return keys, magnitude * changed / changed.norm(dim=1, keepdim=True) - weight
    raise ValueError(kind)


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        pytest.param(*case, id=" ".join(case[:2]), marks=[pytest.mark.slow] if number else [])
        for number, case in enumerate(FUSED)
    ],
)
def test_every_format_acts_on_a_fused_layer(
    pipes, tmp_path: Path, name: str, theirs: str, ours: list[str]
) -> None:
    pipe = pipes(name)
    weights = [layer_of(pipe, layer).weight.detach() for layer in ours]
    for kind in FORMATS:
        keys, change = made(kind, torch.cat(weights))
        path = write(
            tmp_path / f"{kind}.safetensors",
            {f"{theirs}.{key}": value for key, value in keys.items()},
        )
        pieces = change.split([len(weight) for weight in weights])
        require_same(pipe, path, dict(zip(ours, pieces, strict=True)))

"""diffusers' weight names -> those of the original Stable Diffusion code (CompVis ldm, Stability
sgm, OpenCLIP). Pure renaming.

The original UNet counts all layers of one side in one list. With n layers per block, block i of the
way down starts at number i * (n + 1) + 1 and its downsampler is the last of n + 1; block i of the
way up starts at i * (n + 1) and its upsampler sits in the last.
"""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Weights = dict[str, "Tensor"]

UNET_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
OPEN_CLIP_TOP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def unet(weights: Weights) -> Weights:
    """Rename the weights of a UNet2DConditionModel."""
    num_layers = 1 + max(
        int(match[1])
        for key in weights
        if (match := re.match(r"down_blocks\.0\.resnets\.(\d+)", key))
    )
    attending = {
        match[1] for key in weights if (match := re.match(r"up_blocks\.(\d+)\.attentions", key))
    }

    def rename(key: str) -> str:
        match key.split("."):
            case ["down_blocks", block, kind, layer, *rest]:
                number = (
                    int(block) * (num_layers + 1)
                    + 1
                    + (num_layers if kind == "downsamplers" else int(layer))
                )
                return f"input_blocks.{number}.{int(kind == 'attentions')}.{_inside(kind, rest)}"
            case ["up_blocks", block, "upsamplers", _, *rest]:
                position = (
                    2 if block in attending else 1
                )  # it comes after the resnet, and after the attention where there is one
                number = int(block) * (num_layers + 1) + num_layers
                return f"output_blocks.{number}.{position}.{_inside('upsamplers', rest)}"
            case ["up_blocks", block, kind, layer, *rest]:
                number = int(block) * (num_layers + 1) + int(layer)
                return f"output_blocks.{number}.{int(kind == 'attentions')}.{_inside(kind, rest)}"
            case ["mid_block", kind, layer, *rest]:
                number = 1 if kind == "attentions" else 2 * int(layer)
                return f"middle_block.{number}.{_inside(kind, rest)}"
        top, _, tail = key.rpartition(".")
        return f"{UNET_TOP[top]}.{tail}"

    return {rename(key): tensor for key, tensor in weights.items()}


def _inside(kind: str, rest: list[str]) -> str:
    """A name below one entry of the UNet's lists: attention keeps diffusers' names, resnets have
    others.
    """
    if kind == "resnets":
        return f"{UNET_RESNET[rest[0]]}.{rest[1]}"
    if kind == "downsamplers":
        return f"op.{rest[1]}"
    return ".".join(rest)


def vae(weights: Weights) -> Weights:
    """Rename the weights of an AutoencoderKL. Its attention layers are 1 x 1 convolutions in the
    original.
    """
    last = max(
        int(match[1]) for key in weights if (match := re.match(r"decoder\.up_blocks\.(\d+)", key))
    )

    def rename(key: str) -> str:
        match key.split("."):
            case [side, "down_blocks", block, "downsamplers", _, *rest]:
                return ".".join([side, "down", block, "downsample", *rest])
            case [side, "up_blocks", block, "upsamplers", _, *rest]:
                return ".".join([side, "up", str(last - int(block)), "upsample", *rest])
            case [side, "down_blocks", block, "resnets", layer, *rest]:
                return _shortcut(side, "down", block, "block", layer, *rest)
            case [side, "up_blocks", block, "resnets", layer, *rest]:
                return _shortcut(side, "up", str(last - int(block)), "block", layer, *rest)
            case [side, "mid_block", "resnets", layer, *rest]:
                return _shortcut(side, "mid", f"block_{int(layer) + 1}", *rest)
            case [side, "mid_block", "attentions", _, *rest, tail]:
                return ".".join([side, "mid", "attn_1", VAE_ATTENTION[".".join(rest)], tail])
        return key.replace("conv_norm_out", "norm_out")

    is_linear = re.compile(r"attentions\.0\.to_.*weight")
    return {
        rename(key): tensor[:, :, None, None] if is_linear.search(key) else tensor
        for key, tensor in weights.items()
    }


def _shortcut(*parts: str) -> str:
    return ".".join(parts).replace("conv_shortcut", "nin_shortcut")


def clip(weights: Weights) -> Weights:
    """Name the weights of a CLIP text encoder as transformers 4 did, with a prefix that version 5
    writes on some classes only.
    """
    return {
        f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in weights.items()
    }


SD3_TOP = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
SD3_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
SD3_PACKED = {
    ("attn.to_q", "attn.to_k", "attn.to_v"): "x_block.attn.qkv",
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "context_block.attn.qkv",
    ("attn2.to_q", "attn2.to_k", "attn2.to_v"): "x_block.attn2.qkv",
}
"""Layers that the original keeps in one."""


def sd3(weights: Weights) -> Weights:
    """Rename the weights of a SD3Transformer2DModel; its last norms swap shift and scale."""
    import torch

    last = max(int(key.split(".")[1]) for key in weights if key.startswith("transformer_blocks."))
    swapped = ("norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear")
    renamed: Weights = {}
    for key, tensor in weights.items():
        path, _, kind = key.rpartition(".")
        if path in swapped:
            tensor = torch.cat(list(reversed(tensor.chunk(2))))
        if not key.startswith("transformer_blocks."):
            renamed[SD3_TOP[key] if key in SD3_TOP else f"{SD3_TOP[path]}.{kind}"] = tensor
            continue
        block, _, inner = path.removeprefix("transformer_blocks.").partition(".")
        parts, packed = next(
            ((parts, name) for parts, name in SD3_PACKED.items() if inner in parts), ((), "")
        )
        if not parts:
            renamed[f"joint_blocks.{block}.{SD3_BLOCK[inner]}.{kind}"] = tensor
        elif inner == parts[0]:
            names = [f"transformer_blocks.{block}.{part}.{kind}" for part in parts]
            whole = torch.cat([weights[name] for name in names])
            renamed[f"joint_blocks.{block}.{packed}.{kind}"] = whole
    return renamed


def open_clip(weights: Weights) -> Weights:
    """Rename the weights of a CLIP text encoder to OpenCLIP's; it keeps queries, keys and values in
    one layer, and its head transposed.
    """
    import torch

    plain = {key.removeprefix("text_model."): tensor for key, tensor in weights.items()}
    renamed = {original: plain.pop(key) for key, original in OPEN_CLIP_TOP.items()}
    if (head := plain.pop("text_projection.weight", None)) is not None:
        renamed["text_projection"] = head.T
    for key, tensor in plain.items():
        name = key.replace("encoder.layers.", "transformer.resblocks.")
        for new, old in OPEN_CLIP.items():
            name = name.replace(new, old)
        if ".q_proj." in name:
            packed = torch.cat(
                [plain[key.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            )
            renamed[name.replace("q_proj.", "in_proj_")] = packed
        elif ".k_proj." not in name and ".v_proj." not in name:
            renamed[name] = tensor
    return renamed


def zimage(weights: Weights) -> Weights:
    """Rename the weights of a ZImageTransformer2DModel; attention keeps three layers in one."""
    import torch

    renamed: Weights = {}
    for key, tensor in weights.items():
        layer, _, kind = key.rpartition(".to_")
        if kind in ("k.weight", "v.weight"):
            continue
        if kind == "q.weight":
            renamed[f"{layer}.qkv.weight"] = torch.cat(
                [weights[f"{layer}.to_{part}.weight"] for part in "qkv"]
            )
            continue
        for ours, theirs in ZIMAGE.items():
            key = key.replace(ours, theirs)
        renamed[key] = tensor
    return renamed


ZIMAGE = {
    "all_final_layer.2-1.": "final_layer.",
    "all_x_embedder.2-1.": "x_embedder.",
    ".attention.to_out.0.": ".attention.out.",
    ".attention.norm_k.": ".attention.k_norm.",
    ".attention.norm_q.": ".attention.q_norm.",
}
LTX = {"proj_in": "patchify_proj", "time_embed": "adaln_single", "norm_q": "q_norm",
       "norm_k": "k_norm"}  # fmt: skip


def ltx(weights: Weights) -> Weights:
    """Rename the weights of a LTXVideoTransformer3DModel."""
    renamed: Weights = {}
    for key, tensor in weights.items():
        for ours, theirs in LTX.items():
            key = key.replace(ours, theirs)
        renamed[key] = tensor
    return renamed

"""Which layers of a pipeline a LoRA's names refer to.

Names may be diffusers' own, dotted or with underscores, or those of the original models. One layer
of an original may be several of diffusers' (fused queries, keys and values), in order of rows.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "pipe.dit.",
    "transformer.",
    "unet.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
_TEXT_ENCODERS: Mapping[str, Sequence[str]] = {
    r"lora_te1?_|text_encoder\.|text_encoders\.clip_l\.(?:transformer\.)?": ("text_encoder",),
    r"lora_te2_|text_encoder_2\.|text_encoders\.clip_g\.(?:transformer\.)?": ("text_encoder_2",),
    r"lora_te3_|text_encoder_3\.|text_encoders\.t5xxl\.(?:transformer\.)?": (
        "text_encoder_3",
        "text_encoder_2",
    ),
}
"""Prefix -> component; of several, the first that the pipeline has."""

_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


def _under(prefix: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name in names)


_FLUX_BLOCKS = {
    "double_blocks.#.img_attn.qkv": _under("transformer_blocks.#.attn", *_QKV),
    "double_blocks.#.txt_attn.qkv": _under("transformer_blocks.#.attn", *_ADDED),
    "double_blocks.#.img_attn.proj": ("transformer_blocks.#.attn.to_out.0",),
    "double_blocks.#.txt_attn.proj": ("transformer_blocks.#.attn.to_add_out",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("~norm_out.linear",),
}
_FLUX = {
    **_FLUX_BLOCKS,
    "double_blocks.#.processor.qkv1": _under("transformer_blocks.#.attn", *_QKV),
    "double_blocks.#.processor.qkv2": _under("transformer_blocks.#.attn", *_ADDED),
    "double_blocks.#.processor.proj1": ("transformer_blocks.#.attn.to_out.0",),
    "double_blocks.#.processor.proj2": ("transformer_blocks.#.attn.to_add_out",),
    "double_blocks.#.img_mlp.0": ("transformer_blocks.#.ff.net.0.proj",),
    "double_blocks.#.img_mlp.2": ("transformer_blocks.#.ff.net.2",),
    "double_blocks.#.txt_mlp.0": ("transformer_blocks.#.ff_context.net.0.proj",),
    "double_blocks.#.txt_mlp.2": ("transformer_blocks.#.ff_context.net.2",),
    "double_blocks.#.img_mod.lin": ("transformer_blocks.#.norm1.linear",),
    "double_blocks.#.txt_mod.lin": ("transformer_blocks.#.norm1_context.linear",),
    "single_blocks.#.linear1": (
        *_under("single_transformer_blocks.#.attn", *_QKV),
        "single_transformer_blocks.#.proj_mlp",
    ),
    "single_blocks.#.processor.qkv": _under("single_transformer_blocks.#.attn", *_QKV),
    "single_blocks.#.processor.proj": ("single_transformer_blocks.#.proj_out",),
    "single_blocks.#.linear2": ("single_transformer_blocks.#.proj_out",),
    "single_blocks.#.modulation.lin": ("single_transformer_blocks.#.norm.linear",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
}
_CHROMA = {
    **_FLUX,
    "distilled_guidance_layer.layers.#.in_layer": ("distilled_guidance_layer.layers.#.linear_1",),
    "distilled_guidance_layer.layers.#.out_layer": ("distilled_guidance_layer.layers.#.linear_2",),
}
_FLUX2 = {
    **_FLUX_BLOCKS,
    "double_blocks.#.img_mlp.0": ("transformer_blocks.#.ff.linear_in",),
    "double_blocks.#.img_mlp.2": ("transformer_blocks.#.ff.linear_out",),
    "double_blocks.#.txt_mlp.0": ("transformer_blocks.#.ff_context.linear_in",),
    "double_blocks.#.txt_mlp.2": ("transformer_blocks.#.ff_context.linear_out",),
    "single_blocks.#.linear1": ("single_transformer_blocks.#.attn.to_qkv_mlp_proj",),
    "single_blocks.#.linear2": ("single_transformer_blocks.#.attn.to_out",),
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
}
_HUNYUAN_VIDEO = {
    "double_blocks.#.img_attn_qkv": _under("transformer_blocks.#.attn", *_QKV),
    "double_blocks.#.txt_attn_qkv": _under("transformer_blocks.#.attn", *_ADDED),
    "double_blocks.#.img_attn_proj": ("transformer_blocks.#.attn.to_out.0",),
    "double_blocks.#.txt_attn_proj": ("transformer_blocks.#.attn.to_add_out",),
    "double_blocks.#.img_mlp.fc1": ("transformer_blocks.#.ff.net.0.proj",),
    "double_blocks.#.img_mlp.fc2": ("transformer_blocks.#.ff.net.2",),
    "double_blocks.#.txt_mlp.fc1": ("transformer_blocks.#.ff_context.net.0.proj",),
    "double_blocks.#.txt_mlp.fc2": ("transformer_blocks.#.ff_context.net.2",),
    "double_blocks.#.img_mod.linear": ("transformer_blocks.#.norm1.linear",),
    "double_blocks.#.txt_mod.linear": ("transformer_blocks.#.norm1_context.linear",),
    "single_blocks.#.linear1": _FLUX["single_blocks.#.linear1"],
    "single_blocks.#.linear2": _FLUX["single_blocks.#.linear2"],
    "single_blocks.#.modulation.linear": ("single_transformer_blocks.#.norm.linear",),
    "img_in.proj": ("x_embedder.proj",),
}
_SD3 = {
    "joint_blocks.#.x_block.attn.qkv": _under("transformer_blocks.#.attn", *_QKV),
    "joint_blocks.#.x_block.attn2.qkv": _under("transformer_blocks.#.attn2", *_QKV),
    "joint_blocks.#.context_block.attn.qkv": _under("transformer_blocks.#.attn", *_ADDED),
    "joint_blocks.#.x_block.attn.proj": ("transformer_blocks.#.attn.to_out.0",),
    "joint_blocks.#.x_block.attn2.proj": ("transformer_blocks.#.attn2.to_out.0",),
    "joint_blocks.#.context_block.attn.proj": ("transformer_blocks.#.attn.to_add_out",),
    "joint_blocks.#.x_block.mlp.fc1": ("transformer_blocks.#.ff.net.0.proj",),
    "joint_blocks.#.x_block.mlp.fc2": ("transformer_blocks.#.ff.net.2",),
    "joint_blocks.#.context_block.mlp.fc1": ("transformer_blocks.#.ff_context.net.0.proj",),
    "joint_blocks.#.context_block.mlp.fc2": ("transformer_blocks.#.ff_context.net.2",),
    "joint_blocks.#.x_block.adaLN_modulation.1": ("transformer_blocks.#.norm1.linear",),
    "joint_blocks.#.context_block.adaLN_modulation.1": (
        "transformer_blocks.#.norm1_context.linear",
    ),
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("~norm_out.linear",),
}
_WAN = {
    **{
        f"blocks.#.{theirs}.{name}": (f"blocks.#.{ours}.{layer}",)
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for name, layer in (
            *zip("qkv", _QKV, strict=True),
            ("o", "to_out.0"),
            ("k_img", "add_k_proj"),
            ("v_img", "add_v_proj"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
            ("norm_k_img", "norm_added_k"),
        )
    },
    "blocks.#.ffn.0": ("blocks.#.ffn.net.0.proj",),
    "blocks.#.ffn.2": ("blocks.#.ffn.net.2",),
    "blocks.#.norm3": ("blocks.#.norm2",),
    "time_embedding.0": ("condition_embedder.time_embedder.linear_1",),
    "time_embedding.2": ("condition_embedder.time_embedder.linear_2",),
    "time_projection.1": ("condition_embedder.time_proj",),
    "text_embedding.0": ("condition_embedder.text_embedder.linear_1",),
    "text_embedding.2": ("condition_embedder.text_embedder.linear_2",),
    "img_emb.proj.0": ("condition_embedder.image_embedder.norm1",),
    "img_emb.proj.1": ("condition_embedder.image_embedder.ff.net.0.proj",),
    "img_emb.proj.3": ("condition_embedder.image_embedder.ff.net.2",),
    "img_emb.proj.4": ("condition_embedder.image_embedder.norm2",),
    "head.head": ("proj_out",),
    "head": ("",),
}
_Z_IMAGE = {
    **{
        f"{part}.#.attention.{theirs}": _under(f"{part}.#.attention", *ours)
        for part in ("layers", "noise_refiner", "context_refiner")
        for theirs, ours in (
            ("qkv", _QKV),
            ("out", ("to_out.0",)),
            ("q_norm", ("norm_q",)),
            ("k_norm", ("norm_k",)),
        )
    },
    "x_embedder": ("all_x_embedder.2-1",),
    "final_layer.linear": ("all_final_layer.2-1.linear",),
    "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
}
_HUNYUAN = {
    "blocks.#.attn1.Wqkv": _under("blocks.#.attn1", *_QKV),
    "blocks.#.attn1.out_proj": ("blocks.#.attn1.to_out.0",),
    "blocks.#.attn2.q_proj": ("blocks.#.attn2.to_q",),
    "blocks.#.attn2.kv_proj": _under("blocks.#.attn2", "to_k", "to_v"),
    "blocks.#.attn2.out_proj": ("blocks.#.attn2.to_out.0",),
    "blocks.#.mlp.fc1": ("blocks.#.ff.net.0.proj",),
    "blocks.#.mlp.fc2": ("blocks.#.ff.net.2",),
    "blocks.#.default_modulation.1": ("blocks.#.norm1.linear",),
    "mlp_t5.0": ("text_embedder.linear_1",),
    "mlp_t5.2": ("text_embedder.linear_2",),
    "t_embedder.mlp.0": ("time_extra_emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_extra_emb.timestep_embedder.linear_2",),
    "extra_embedder.0": ("time_extra_emb.extra_embedder.linear_1",),
    "extra_embedder.2": ("time_extra_emb.extra_embedder.linear_2",),
    "x_embedder.proj": ("pos_embed.proj",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("~norm_out.linear",),
}
_PIXART = {
    "blocks.#.attn.qkv": _under("transformer_blocks.#.attn1", *_QKV),
    "blocks.#.attn.proj": ("transformer_blocks.#.attn1.to_out.0",),
    "blocks.#.cross_attn.q_linear": ("transformer_blocks.#.attn2.to_q",),
    "blocks.#.cross_attn.kv_linear": _under("transformer_blocks.#.attn2", "to_k", "to_v"),
    "blocks.#.cross_attn.proj": ("transformer_blocks.#.attn2.to_out.0",),
    "blocks.#.mlp.fc1": ("transformer_blocks.#.ff.net.0.proj",),
    "blocks.#.mlp.fc2": ("transformer_blocks.#.ff.net.2",),
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("adaln_single.emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("adaln_single.emb.timestep_embedder.linear_2",),
    "t_block.1": ("adaln_single.linear",),
    "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
    "final_layer.linear": ("proj_out",),
}
_ORIGINALS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "FluxTransformer2DModel": _FLUX,
    "ChromaTransformer2DModel": _CHROMA,
    "Flux2Transformer2DModel": _FLUX2,
    "SD3Transformer2DModel": _SD3,
    "HunyuanVideoTransformer3DModel": _HUNYUAN_VIDEO,
    "WanTransformer3DModel": _WAN,
    "ZImageTransformer2DModel": _Z_IMAGE,
    "HunyuanDiT2DModel": _HUNYUAN,
    "PixArtTransformer2DModel": _PIXART,
}
"""Class -> name in the original model -> names in diffusers. #: a number. ~: the halves (shift,
scale) are swapped.
"""

_NOISE = re.compile(r"(high|low)[ _-]?noise|(?<![a-z])(high|low)[ _-]?v?[\d.]*$")

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


@dataclass(frozen=True)
class Place:
    """A layer of a component."""

    component: str
    layer: str
    is_swapped: bool = False  # the halves of its rows are in the other order in the file


class LayerNames:
    """The names of one pipeline's layers in every naming scheme."""

    def __init__(self, components: Mapping[str, Any], denoisers: Sequence[str]) -> None:
        """denoisers: those that names without one refer to."""
        self._denoisers = denoisers
        self._tables = {
            name: _table(name, module)
            for name, module in components.items()
            if isinstance(module, nn.Module)
            and (name in denoisers or name.startswith(("text_encoder", "transformer_")))
        }

    def places(self, name: str) -> tuple[tuple[Place, ...], ...]:
        """Return the layers that a name in a file refers to, of each component that has them; none
        in place of those that a component lacks.
        """
        components, rest = self._components(name)
        return tuple(self._places(component, rest) for component in components)

    def _places(self, component: str, rest: str) -> tuple[Place, ...]:
        table = self._tables.get(component, {})
        while True:
            for alias in (rest, rest.replace(".processor.", "."), f"tran{rest}"):
                if alias in table:
                    return table[alias]
            prefix = next((prefix for prefix in _PREFIXES if rest.startswith(prefix)), None)
            if prefix is None:
                return ()
            rest = rest.removeprefix(prefix)

    def _components(self, name: str) -> tuple[Sequence[str], str]:
        rest = name.removeprefix("base_model.model.")
        for pattern, components in _TEXT_ENCODERS.items():
            if match := re.match(pattern, rest):
                found = next((one for one in components if one in self._tables), components[0])
                return (found,), rest[match.end() :]
        named, _, inner = rest.partition(".")
        if named.startswith("transformer_") and named in self._tables:
            return (named,), inner
        return self._denoisers, name


def denoisers_of(path: str, names: Iterable[str], denoisers: Sequence[str]) -> Sequence[str]:
    """Return the denoisers that names without one refer to.

    Wan 2.2's LoRAs are files for the first steps (high noise) and for the last (low noise). The
    names of the tensors are the same, only the name of the file says which. A file for neither,
    such as one of Wan 2.1, is for both.
    """
    first, *others = denoisers
    if any(name.startswith(f"{other}.") for name in names for other in others):
        return (first,)
    said = {match[1] or match[2] for match in _NOISE.finditer(Path(path).stem.lower())}
    if len(denoisers) == 2 and len(said) == 1:
        return (first,) if said == {"high"} else (others[0],)
    return denoisers


def plain_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of all modules, without those that peft added."""
    inside: str | None = None
    for name, layer in module.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        inside = f"{name}." if isinstance(layer, BaseTunerLayer) else None
        yield name, layer


def _table(component: str, module: nn.Module) -> dict[str, tuple[Place, ...]]:
    """Return name, dotted or with underscores -> layers."""
    names = [name for name, layer in plain_layers(module) if _has_weights(layer)]
    table: dict[str, tuple[Place, ...]] = {}
    for theirs, ours in _other_names(module, names):
        places = tuple(
            Place(component, name.removeprefix("~"), name.startswith("~")) for name in ours
        )
        table[theirs] = table[theirs.replace(".", "_")] = places
    for name in names:
        table[name] = table[name.replace(".", "_")] = (Place(component, name),)
    return table


def _has_weights(layer: nn.Module) -> bool:
    """Return whether the layer itself has weights, plain or packed."""
    return (
        isinstance(layer, BaseTunerLayer)
        or getattr(layer, "weight", None) is not None
        or any(True for _ in layer.parameters(recurse=False))
    )


def _other_names(module: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    known = set(names)
    for name in names:
        for alias in _aliases(name):
            yield alias, (name,)
    if hasattr(module, "down_blocks"):
        yield from _unet_names(module, names)
    for theirs, ours in _ORIGINALS.get(type(module).__name__, {}).items():
        pattern = re.compile(re.escape(ours[0].removeprefix("~")).replace(r"\#", r"(\d+)"))
        for match in filter(None, map(pattern.fullmatch, names)):
            number = match[1] if match.groups() else ""
            targets = tuple(name.replace("#", number) for name in ours)
            if all(target.removeprefix("~") in known for target in targets):
                yield theirs.replace("#", number), _swapped_where_last(module, theirs, targets)


def _swapped_where_last(
    module: nn.Module, theirs: str, targets: tuple[str, ...]
) -> tuple[str, ...]:
    """Mark swapped halves in the last block of Stable Diffusion 3, whose text norm differs."""
    if theirs != "joint_blocks.#.context_block.adaLN_modulation.1":
        return targets
    norm = module.get_submodule(targets[0].removesuffix(".linear"))
    return (f"~{targets[0]}",) if type(norm).__name__ == "AdaLayerNormContinuous" else targets


def _aliases(name: str) -> Iterator[str]:
    """Yield other spellings of a name in diffusers and transformers."""
    if name.endswith(".to_out.0"):
        yield name.removesuffix(".0")
    for one in (name, name.removeprefix("text_model.")):
        yield from (one, f"text_model.{one}")
        if match := re.fullmatch(r"(.*\.self_attn)\.(q|k|v|out)_proj", one):
            yield from (f"{match[1]}.to_{match[2]}", f"text_model.{match[1]}.to_{match[2]}")
    if ".motion_modules." in name:
        original = name.replace(
            ".transformer_blocks.", ".temporal_transformer.transformer_blocks.", 1
        )
        yield re.sub(
            r"\.attn([12])\.", lambda match: f".attention_blocks.{int(match[1]) - 1}.", original
        )


def _unet_names(unet: Any, names: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the original Stable Diffusion names, which number all blocks consecutively."""
    blocks = dict(_unet_blocks(unet))
    for theirs, ours in _UNET.items():
        if ours in names:
            yield theirs, (ours,)
    for name in names:
        for theirs, ours in blocks.items():
            if name.startswith(f"{ours}."):
                rest = name.removeprefix(f"{ours}.")
                inner = next(
                    (
                        inner
                        for inner, resnet in _RESNET.items()
                        if resnet == rest and ".resnets." in name
                    ),
                    rest,
                )
                yield f"{theirs}.{inner}", (name,)
            elif name == ours:
                yield theirs, (name,)


def _unet_blocks(unet: Any) -> Iterator[tuple[str, str]]:
    number = 1
    for place, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            yield from _pair(f"input_blocks.{number}", f"down_blocks.{place}", layer, block)
            number += 1
        if getattr(block, "downsamplers", None):
            yield f"input_blocks.{number}.0.op", f"down_blocks.{place}.downsamplers.0.conv"
            number += 1
    yield from (
        ("middle_block.0", "mid_block.resnets.0"),
        ("middle_block.1", "mid_block.attentions.0"),
    )
    yield "middle_block.2", "mid_block.resnets.1"
    number = 0
    for place, block in enumerate(unet.up_blocks):
        for layer in range(len(block.resnets)):
            yield from _pair(f"output_blocks.{number}", f"up_blocks.{place}", layer, block)
            number += 1
        if getattr(block, "upsamplers", None):
            inner = 2 if getattr(block, "attentions", None) else 1
            yield f"output_blocks.{number - 1}.{inner}.conv", f"up_blocks.{place}.upsamplers.0.conv"


def _pair(theirs: str, ours: str, layer: int, block: Any) -> Iterator[tuple[str, str]]:
    yield f"{theirs}.0", f"{ours}.resnets.{layer}"
    if getattr(block, "attentions", None):
        yield f"{theirs}.1", f"{ours}.attentions.{layer}"

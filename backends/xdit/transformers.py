"""What the parallel code must know about each diffusers transformer: where its tokens come from and
which arguments follow them.

One row per denoiser class. A model whose class has a row needs no code; see docs/xdit.md for how to
add one.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF
from torch import Tensor, nn

from backends.errors import UnsupportedError


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerSpec:
    """Facts about one denoiser class. "Image" tokens are those that become the image.

    blocks: module lists of transformer blocks, in the order in which they run.
    embed: module that turns latents (B, C, H, W) into image tokens (B, N, D); None: the pipeline
    hands over tokens as hidden_states.
    embeds_map: what comes out of it is a map (B, D, F, H, W), whose cells the class turns into
    tokens afterwards.
    positions: module that makes the positions -> for each tensor that it returns, whose tokens it
    has an entry for, and in which dim.
    text_length: that module's argument for the number of text tokens, which it is told of this
    rank's alone.
    cut_in_blocks: arguments of the blocks that are cut where the first, or every, block gets them,
    and their token dim; for a class that
        puts its tokens together only just before the blocks. The first one is the tokens
        themselves.
    text: argument with the text tokens (B, T, D) that run through the blocks beside the image;
    None: text is only cross-attended to.
    is_text_first: text comes before the image where the two are concatenated.
    image_arguments, text_arguments: further arguments with one entry per token, and the dim in
    which they have it. Lists and tuples
        of tensors are cut one by one.
    image_attention: names of attention modules that see image tokens alone (the others see both,
    where the text runs along).
    cross_attention: names of those that see the text alone, which every rank has all of.
    image_prompt_keys: image prompt tokens (IP-Adapter) are attended to in a call of their own:
    'alone', or 'after image' tokens.
    tail: module (or a ModuleDict of such) after the last block that is given all image tokens
    first.
    num_tokens: a call's arguments by name -> N, where it does not follow from the first argument's
    shape.
    has_stages: PipeFusion can spread its blocks over stages.
    crosses_skips: blocks of the second half take the outputs of blocks of the first, so that they
    cannot be spread over stages.
    """

    blocks: tuple[str, ...]
    embed: str | None = None
    embeds_map: bool = False
    positions: Mapping[str, tuple[tuple[Literal["image", "text"], int], ...]] = field(
        default_factory=dict
    )
    text_length: str | None = None
    cut_in_blocks: Mapping[str, int] = field(default_factory=dict)
    text: str | None = None
    is_text_first: bool = False
    image_arguments: Mapping[str, int] = field(default_factory=dict)
    text_arguments: Mapping[str, int] = field(default_factory=dict)
    image_attention: frozenset[str] = frozenset()
    cross_attention: frozenset[str] = frozenset()
    image_prompt_keys: str = "alone"
    tail: str = "norm_out"
    num_tokens: Callable[[Mapping[str, Any]], int] | None = None
    has_stages: bool = False
    crosses_skips: bool = False

    def num_image_tokens(self, denoiser: nn.Module, arguments: Mapping[str, Any]) -> int:
        """N, from the arguments of the denoiser's call by name."""
        if self.num_tokens is not None:
            return self.num_tokens(arguments)
        latents: Tensor = next(iter(arguments.values()))
        if self.embed is None:
            return latents.shape[1]
        patch_size = denoiser.config.patch_size
        sides = patch_size if isinstance(patch_size, list | tuple) else (patch_size, patch_size)
        return math.prod(
            length // side for length, side in zip(latents.shape[-len(sides) :], sides, strict=True)
        )


def _num_zimage_tokens(arguments: Mapping[str, Any]) -> int:
    """Tokens of the image and of the text, each padded to a multiple of 32, of a call for images of
    one text length.
    """
    latents, text = arguments["x"][0], arguments["cap_feats"][0]
    side, frames = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    counts = (
        (latents.shape[1] // frames) * (latents.shape[2] // side) * (latents.shape[3] // side),
        len(text),
    )
    return sum(math.ceil(count / SEQ_MULTI_OF) * SEQ_MULTI_OF for count in counts)


FAMILIES = {
    "SD3Transformer2DModel": TransformerSpec(
        blocks=("transformer_blocks",),
        embed="pos_embed",
        text="encoder_hidden_states",
        image_arguments={"block_controlnet_hidden_states": 1},
        image_attention=frozenset({"attn2"}),
        image_prompt_keys="after image",
        has_stages=True,
    ),
    "FluxTransformer2DModel": TransformerSpec(
        blocks=("transformer_blocks", "single_transformer_blocks"),
        text="encoder_hidden_states",
        is_text_first=True,
        image_arguments={
            "hidden_states": 1,
            "img_ids": 0,
            "controlnet_block_samples": 1,
            "controlnet_single_block_samples": 1,
        },
        text_arguments={"txt_ids": 0},
        has_stages=True,
    ),
    "PixArtTransformer2DModel": TransformerSpec(
        blocks=("transformer_blocks",), embed="pos_embed", has_stages=True
    ),
    "HunyuanDiT2DModel": TransformerSpec(
        blocks=("blocks",),
        embed="pos_embed",
        image_arguments={"image_rotary_emb": 0, "controlnet_block_samples": 1},
        crosses_skips=True,
    ),
    "QwenImageTransformer2DModel": TransformerSpec(
        blocks=("transformer_blocks",),
        text="encoder_hidden_states",
        is_text_first=True,
        positions={"pos_embed": (("image", 0), ("text", 0))},
        text_length="max_txt_seq_len",
        image_arguments={"hidden_states": 1, "controlnet_block_samples": 1},
        text_arguments={"encoder_hidden_states_mask": 1},
    ),
    "Flux2Transformer2DModel": TransformerSpec(
        blocks=("transformer_blocks", "single_transformer_blocks"),
        text="encoder_hidden_states",
        is_text_first=True,
        image_arguments={"hidden_states": 1, "img_ids": -2},
        text_arguments={"txt_ids": -2},
    ),
    "WanTransformer3DModel": TransformerSpec(
        blocks=("blocks",),
        embed="patch_embedding",
        embeds_map=True,
        positions={"rope": (("image", 1), ("image", 1))},
        cross_attention=frozenset({"attn2"}),
    ),
    "ZImageTransformer2DModel": TransformerSpec(
        blocks=("layers",),
        cut_in_blocks={"x": 1, "freqs_cis": 1},
        image_arguments={"controlnet_block_samples": 1},
        tail="all_final_layer",
        num_tokens=_num_zimage_tokens,
    ),
}


def family_of(denoiser: nn.Module) -> TransformerSpec:
    """The row of this denoiser's class. UnsupportedError if there is none."""
    for base in type(denoiser).__mro__:
        if base.__name__ in FAMILIES:
            return FAMILIES[base.__name__]
    raise UnsupportedError(
        f"backend 'xdit' cannot spread the tokens of {type(denoiser).__name__}. Allowed: "
        f"{', '.join(FAMILIES)}. "
        "Use CFG parallelism alone (--use_cfg_parallel on 2 ranks), or another backend."
    )

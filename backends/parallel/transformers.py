"""Facts about the diffusers transformers that the backends can split: one row per class.

Imports no torch, so that plans are checked with the same facts that execution uses. A model whose
class has a row needs no code; docs/xdit.md explains how to add one.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Arguments = Mapping[str, Any]
"""Arguments of a call by name, in the order of the signature."""
ZIMAGE_MULTIPLE = 32
"""Z-Image pads image and text tokens each to a multiple of this number. A test compares it with
diffusers' SEQ_MULTI_OF.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerSpec:
    """Facts about one denoiser class. "Image" tokens are the ones that become the image."""

    # Lists of transformer blocks, in the order in which they run.
    blocks: tuple[str, ...]
    # Module that turns latents (B, C, H, W) into image tokens (B, N, D). None: the pipeline passes
    # tokens as hidden_states.
    embed: str | None = None
    # The embedding returns a map (B, D, F, H, W), which the class flattens into tokens afterwards.
    embeds_map: bool = False
    # Position-embedding module -> for each of its outputs, (stream, token dim).
    positions: Mapping[str, tuple[tuple[Literal["image", "text"], int], ...]] = field(
        default_factory=dict
    )
    # Argument of that module with the number of text tokens, if the class counts this rank's only.
    text_length: str | None = None
    # Block arguments -> token dim, for a class that joins its tokens just before the blocks. The
    # first argument (the tokens) is cut at the first block, the others at every block.
    cut_in_blocks: Mapping[str, int] = field(default_factory=dict)
    # Argument with the text tokens (B, T, D) that run through the blocks beside the image. None:
    # the text is read by cross-attention only.
    text: str | None = None
    # Text precedes the image where the two are concatenated.
    is_text_first: bool = False
    # Further arguments with one entry per image token -> token dim. Lists and tuples of tensors are
    # cut one by one.
    image_arguments: Mapping[str, int] = field(default_factory=dict)
    # The same for text tokens.
    text_arguments: Mapping[str, int] = field(default_factory=dict)
    # Attention modules over image tokens only. The others also see text tokens, if there are any.
    image_attention: frozenset[str] = frozenset()
    # Attention modules over text tokens only. Every rank has all of these.
    cross_attention: frozenset[str] = frozenset()
    # Attention to image prompt tokens (IP-Adapter): in a separate call, or in the same call after
    # the image tokens.
    image_prompt_keys: Literal["alone", "after image"] = "alone"
    # Module (or ModuleDict) after the last block: the first one that needs all tokens.
    tail: str = "norm_out"
    # Number of tokens of a call, where it does not follow from the first argument's shape.
    num_tokens: Callable[[Arguments], int] | None = None
    # DistriFuser can cut its tokens into patches.
    has_patches: bool = False
    # PipeFusion can split its blocks into stages.
    has_stages: bool = False
    # diffusers has a tensor-parallel plan (`_tp_plan`) for it; a test compares.
    has_tensor_plan: bool = False
    # Its later blocks read skip connections from earlier ones, so stages cannot split them.
    crosses_skips: bool = False

    @property
    def image_tokens(self) -> Literal["all", "first", "last"]:
        """Position of the image tokens in the sequence that an attention layer sees."""
        if self.text is None:
            return "all"
        return "last" if self.is_text_first else "first"

    def num_image_tokens(self, config: Any, arguments: Arguments) -> int:
        """Return the number of image tokens of a call. config: the denoiser's configuration."""
        if self.num_tokens is not None:
            return self.num_tokens(arguments)
        latents = next(iter(arguments.values()))
        if self.embed is None:
            return latents.shape[1]
        side = config.patch_size
        sides = side if isinstance(side, list | tuple) else (side, side)
        return math.prod(
            length // side for length, side in zip(latents.shape[-len(sides) :], sides, strict=True)
        )


def _num_zimage_tokens(arguments: Arguments) -> int:
    """Return the number of padded image and text tokens of a call.

    All images of the call have prompts of the same length.
    """
    latents, text = arguments["x"][0], arguments["cap_feats"][0]
    side, frames = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    counts = (
        (latents.shape[1] // frames) * (latents.shape[2] // side) * (latents.shape[3] // side),
        len(text),
    )
    return sum(math.ceil(count / ZIMAGE_MULTIPLE) * ZIMAGE_MULTIPLE for count in counts)


TRANSFORMERS = {
    "SD3Transformer2DModel": TransformerSpec(
        blocks=("transformer_blocks",),
        embed="pos_embed",
        text="encoder_hidden_states",
        image_arguments={"block_controlnet_hidden_states": 1},
        image_attention=frozenset({"attn2"}),
        image_prompt_keys="after image",
        has_patches=True,
        has_stages=True,
    ),
    "FluxTransformer2DModel": TransformerSpec(
        blocks=("transformer_blocks", "single_transformer_blocks"),
        text="encoder_hidden_states",
        is_text_first=True,
        image_arguments={
            "hidden_states": 1,
            "img_ids": -2,
            "controlnet_block_samples": 1,
            "controlnet_single_block_samples": 1,
        },
        text_arguments={"txt_ids": -2},
        has_patches=True,
        has_stages=True,
        has_tensor_plan=True,
    ),
    "PixArtTransformer2DModel": TransformerSpec(
        blocks=("transformer_blocks",), embed="pos_embed", has_patches=True, has_stages=True
    ),
    "HunyuanDiT2DModel": TransformerSpec(
        blocks=("blocks",),
        embed="pos_embed",
        image_arguments={"image_rotary_emb": -2, "controlnet_block_samples": 1},
        has_patches=True,
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
        has_tensor_plan=True,
    ),
    "Flux2Transformer2DModel": TransformerSpec(
        blocks=("transformer_blocks", "single_transformer_blocks"),
        text="encoder_hidden_states",
        is_text_first=True,
        image_arguments={"hidden_states": 1, "img_ids": -2},
        text_arguments={"txt_ids": -2},
        has_tensor_plan=True,
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
"""Class name -> its row."""


def transformer_of(model: object) -> TransformerSpec | None:
    """Return the row of the model's class or of a base class; None if there is none."""
    names = [base.__name__ for base in type(model).__mro__]
    return next((TRANSFORMERS[name] for name in names if name in TRANSFORMERS), None)


def names_with(fact: str) -> list[str]:
    """Return the names of the classes whose rows have this fact, such as `has_stages`."""
    return sorted(name for name, row in TRANSFORMERS.items() if getattr(row, fact))

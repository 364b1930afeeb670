"""What the parallel code must know about each diffusers transformer: where its tokens come from and which arguments follow them.

One row per denoiser class. A model whose class has a row needs no code; see docs/xdit.md for how to add one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from backends.errors import UnsupportedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Facts about one denoiser class. "Image" tokens are those that become the picture.

    blocks: module lists of transformer blocks, in the order in which they run.
    embed: module that turns latents (B, C, H, W) into image tokens (B, N, D); None: the pipeline hands over tokens as hidden_states.
    text: argument with the text tokens (B, T, D) that run through the blocks beside the image; None: text is only cross-attended to.
    is_text_first: text comes before the image where the two are concatenated.
    image_arguments, text_arguments: further arguments with one entry per token, and the dim in which they have it. Lists and tuples
        of tensors are cut one by one.
    image_attention: names of attention modules that see image tokens alone (the others see both, where the text runs along).
    image_prompt_keys: image prompt tokens (IP-Adapter) are attended to in a call of their own: 'alone', or 'after image' tokens.
    tail: module after the last block that is given all image tokens first.
    crosses_skips: blocks of the second half take the outputs of blocks of the first, so that they cannot be spread over stages.
    """

    blocks: tuple[str, ...]
    embed: str | None = None
    text: str | None = None
    is_text_first: bool = False
    image_arguments: Mapping[str, int] = field(default_factory=dict)
    text_arguments: Mapping[str, int] = field(default_factory=dict)
    image_attention: frozenset[str] = frozenset()
    image_prompt_keys: str = "alone"
    tail: str = "norm_out"
    crosses_skips: bool = False

    def num_image_tokens(self, denoiser: nn.Module, hidden_states: Tensor) -> int:
        """N, from the denoiser's first argument."""
        if self.embed is None:
            return hidden_states.shape[1]
        patch_size = denoiser.config.patch_size
        return (hidden_states.shape[-2] // patch_size) * (hidden_states.shape[-1] // patch_size)


_FAMILIES = {
    "SD3Transformer2DModel": Family(
        blocks=("transformer_blocks",),
        embed="pos_embed",
        text="encoder_hidden_states",
        image_arguments={"block_controlnet_hidden_states": 1},
        image_attention=frozenset({"attn2"}),
        image_prompt_keys="after image",
    ),
    "FluxTransformer2DModel": Family(
        blocks=("transformer_blocks", "single_transformer_blocks"),
        text="encoder_hidden_states",
        is_text_first=True,
        image_arguments={"hidden_states": 1, "img_ids": 0, "controlnet_block_samples": 1, "controlnet_single_block_samples": 1},
        text_arguments={"txt_ids": 0},
    ),
    "PixArtTransformer2DModel": Family(blocks=("transformer_blocks",), embed="pos_embed"),
    "HunyuanDiT2DModel": Family(
        blocks=("blocks",),
        embed="pos_embed",
        image_arguments={"image_rotary_emb": 0, "controlnet_block_samples": 1},
        crosses_skips=True,
    ),
}


def family_of(denoiser: nn.Module) -> Family:
    """The row of this denoiser's class. UnsupportedError if there is none."""
    for base in type(denoiser).__mro__:
        if base.__name__ in _FAMILIES:
            return _FAMILIES[base.__name__]
    raise UnsupportedError(
        f"backend 'xdit' cannot spread the tokens of {type(denoiser).__name__}. Allowed: {', '.join(_FAMILIES)}. "
        "Use CFG parallelism alone (--use_cfg_parallel on 2 ranks), or another backend."
    )

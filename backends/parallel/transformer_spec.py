"""The form of a row about a diffusers transformer (transformers.py has the rows).

Imports no torch, so that plans are checked with the same facts that execution uses.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Arguments = Mapping[str, Any]
"""Arguments of a call by name, in the order of the signature."""


class Cut(NamedTuple):
    """Where an argument of a block, or each tensor in it, has one entry per token. An integer is
    the number of tokens at the start.
    """

    stream: Literal["image", "text", "joint"]  # joint: text and image in the order of the model
    dim: int
    ndim: int | None = None  # only in tensors of so many dims; others are the same for all tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCut:
    """How one list of blocks takes its tokens. They are cut at its first block and gathered after
    its last one, so that the class's own code between the lists sees all of them.
    """

    # The first one with a stream tells its number of tokens. A tuple: for each of its items, None
    # for one that is the same for all tokens.
    arguments: Mapping[str, Cut | tuple[Cut | None, ...]]
    # Streams of what a block returns; whole: every rank computes all of it.
    returns: tuple[Literal["image", "text", "whole"], ...] = ("image",)
    is_text_first: bool = False
    # The class computes with whole tokens between the blocks: gather after each of them.
    gathers_each: bool = False

    @property
    def has_text(self) -> bool:
        """Whether the blocks compute text tokens beside the image's."""
        return "text" in self.returns


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
    # List of blocks -> how it is cut, for a class whose own code sees all tokens. Its other facts
    # about tokens (embed to tail) are not used.
    cuts: Mapping[str, BlockCut] = field(default_factory=dict)
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
    # Attention modules whose queries every rank has, and whose keys are image tokens (cuts only).
    gathers_keys: frozenset[str] = frozenset()
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

    def has_text_in(self, path: str) -> bool:
        """Whether text runs beside the image in the blocks of this module (cuts only)."""
        return any(cut.has_text for name, cut in self.cuts.items() if path.startswith(f"{name}."))

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

"""Facts about the diffusers transformers that the backends can split: one row per class.

Imports no torch. A model whose class has a row needs no code; docs/xdit.md explains how to add one.
"""

import math

from backends.parallel.transformer_spec import Arguments, BlockCut, Cut, TransformerSpec

ZIMAGE_MULTIPLE = 32
"""Z-Image pads image and text tokens each to a multiple of this number. A test compares it with
diffusers' SEQ_MULTI_OF.
"""


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


_ONE = {"hidden_states": Cut("image", 1)}
_STREAMS = {"hidden_states": Cut("image", 1), "encoder_hidden_states": Cut("text", 1)}
_WAN_ARGUMENTS = {
    "hidden_states": Cut("image", 1),
    "rotary_emb": Cut("image", 1),
    "temb": Cut("image", 1, ndim=4),  # a timestep for each token
}


def _wan(blocks: str, *, gathers_each: bool = False) -> TransformerSpec:
    """Video tokens that read the text by cross-attention."""
    return TransformerSpec(
        blocks=(blocks,),
        cuts={blocks: BlockCut(arguments=_WAN_ARGUMENTS, gathers_each=gathers_each)},
        cross_attention=frozenset({"attn2"}),
    )


def _one_stream(blocks: str, positions: Cut) -> TransformerSpec:
    """Text and image in one sequence."""
    arguments = {**_ONE, "image_rotary_emb": positions}
    return TransformerSpec(blocks=(blocks,), cuts={blocks: BlockCut(arguments=arguments)})


def _joint(blocks: str, *, gathers_each: bool = False, **arguments: Cut) -> TransformerSpec:
    """Two streams, text first, in blocks that return the image first."""
    cut = BlockCut(
        arguments={**_STREAMS, **arguments},
        returns=("image", "text"),
        is_text_first=True,
        gathers_each=gathers_each,
    )
    return TransformerSpec(blocks=(blocks,), cuts={blocks: cut})


def _flux_like() -> TransformerSpec:
    """Two streams in double and single blocks, with one table of positions."""
    lists = ("transformer_blocks", "single_transformer_blocks")
    cut = BlockCut(
        arguments={**_STREAMS, "image_rotary_emb": Cut("joint", 0)},
        returns=("text", "image"),
        is_text_first=True,
    )
    return TransformerSpec(blocks=lists, cuts=dict.fromkeys(lists, cut))


def _hunyuan() -> TransformerSpec:
    """Two streams, image first. Tokens of the first frame may be modulated otherwise."""
    lists = ("transformer_blocks", "single_transformer_blocks")
    cut = BlockCut(
        arguments={
            **_STREAMS,
            "freqs_cis": Cut("image", 0),
            "image_rotary_emb": Cut("image", 0),
            "num_tokens": Cut("image", 0),
        },
        returns=("image", "text"),
    )
    return TransformerSpec(blocks=lists, cuts=dict.fromkeys(lists, cut))


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
    "Flux2Transformer2DModel": TransformerSpec(
        blocks=("transformer_blocks", "single_transformer_blocks"),
        text="encoder_hidden_states",
        is_text_first=True,
        image_arguments={"hidden_states": 1, "img_ids": -2},
        text_arguments={"txt_ids": -2},
        has_tensor_plan=True,
    ),
    "ZImageTransformer2DModel": TransformerSpec(
        blocks=("layers",),
        cut_in_blocks={"x": 1, "freqs_cis": 1},
        image_arguments={"controlnet_block_samples": 1},
        tail="all_final_layer",
        num_tokens=_num_zimage_tokens,
    ),
    "QwenImageTransformer2DModel": TransformerSpec(
        blocks=("transformer_blocks",),
        cuts={
            "transformer_blocks": BlockCut(
                arguments={
                    **_STREAMS,
                    "image_rotary_emb": (Cut("image", 0), Cut("text", 0)),
                    "encoder_hidden_states_mask": Cut("text", 1),
                    "modulate_index": Cut("image", 1),
                },
                returns=("text", "image"),
                is_text_first=True,
            )
        },
        image_arguments={"controlnet_block_samples": 1},
        has_tensor_plan=True,
    ),
    "WanTransformer3DModel": _wan("blocks"),
    "WanVACETransformer3DModel": TransformerSpec(
        blocks=("blocks", "vace_blocks"),
        cuts={
            "blocks": BlockCut(arguments=_WAN_ARGUMENTS, gathers_each=True),
            "vace_blocks": BlockCut(
                arguments=_WAN_ARGUMENTS | {"control_hidden_states": Cut("image", 1)},
                returns=("image", "image"),
                gathers_each=True,
            ),
        },
        cross_attention=frozenset({"attn2"}),
    ),
    "WanAnimateTransformer3DModel": _wan("blocks", gathers_each=True),
    "ChronoEditTransformer3DModel": _wan("blocks"),
    "SkyReelsV2Transformer3DModel": TransformerSpec(
        blocks=("blocks",),
        cuts={"blocks": BlockCut(arguments=_WAN_ARGUMENTS | {"temb": Cut("image", 2, ndim=4)})},
        cross_attention=frozenset({"attn2"}),
    ),
    "AnyFlowTransformer3DModel": TransformerSpec(
        blocks=("blocks",),
        cuts={"blocks": BlockCut(arguments=_WAN_ARGUMENTS | {"rotary_emb": Cut("image", -2)})},
        cross_attention=frozenset({"attn2"}),
    ),
    "AuraFlowTransformer2DModel": TransformerSpec(
        blocks=("joint_transformer_blocks", "single_transformer_blocks"),
        cuts={
            "joint_transformer_blocks": BlockCut(
                arguments=_STREAMS, returns=("text", "image"), is_text_first=True
            ),
            "single_transformer_blocks": BlockCut(arguments=_ONE),
        },
    ),
    "CogVideoXTransformer3DModel": _joint("transformer_blocks", image_rotary_emb=Cut("image", 0)),
    "ConsisIDTransformer3DModel": _joint(
        "transformer_blocks", gathers_each=True, image_rotary_emb=Cut("image", 0)
    ),
    "CogView3PlusTransformer2DModel": _joint("transformer_blocks"),
    "CogView4Transformer2DModel": _joint("transformer_blocks", image_rotary_emb=Cut("image", 0)),
    "GlmImageTransformer2DModel": _joint("transformer_blocks", image_rotary_emb=Cut("image", 0)),
    "EasyAnimateTransformer3DModel": _joint("transformer_blocks", image_rotary_emb=Cut("image", 0)),
    "AllegroTransformer3DModel": TransformerSpec(
        blocks=("transformer_blocks",),
        cuts={
            "transformer_blocks": BlockCut(
                arguments=_ONE
                | {
                    "attention_mask": Cut("image", -1),
                    # tables of angles, and which of them each token has
                    "image_rotary_emb": (None, Cut("image", -1)),
                }
            )
        },
        cross_attention=frozenset({"attn2"}),
    ),
    "DiTTransformer2DModel": TransformerSpec(
        blocks=("transformer_blocks",), cuts={"transformer_blocks": BlockCut(arguments=_ONE)}
    ),
    "BriaTransformer2DModel": _flux_like(),
    "LongCatImageTransformer2DModel": _flux_like(),
    "OvisImageTransformer2DModel": _flux_like(),
    "BriaFiboTransformer2DModel": TransformerSpec(
        blocks=("transformer_blocks", "single_transformer_blocks"),
        text="encoder_hidden_states",
        is_text_first=True,
        image_arguments={"hidden_states": 1, "img_ids": -2},
        text_arguments={"txt_ids": -2, "text_encoder_layers": 1},
    ),
    "ChromaTransformer2DModel": TransformerSpec(
        blocks=("transformer_blocks", "single_transformer_blocks"),
        cuts={
            "transformer_blocks": BlockCut(
                arguments={**_STREAMS, "image_rotary_emb": Cut("joint", 0)},
                returns=("text", "image"),
                is_text_first=True,
            ),
            "single_transformer_blocks": BlockCut(
                arguments={**_ONE, "image_rotary_emb": Cut("image", 0)}
            ),
        },
        image_arguments={"controlnet_block_samples": 1},
    ),
    "ErnieImageTransformer2DModel": TransformerSpec(
        blocks=("layers",),
        cuts={
            "layers": BlockCut(
                arguments={
                    "x": Cut("image", 0),
                    "rotary_pos_emb": Cut("image", 1),
                    "temb": Cut("image", 0),
                }
            )
        },
    ),
    "HiDreamImageTransformer2DModel": TransformerSpec(
        blocks=("double_stream_blocks", "single_stream_blocks"),
        cuts={
            "double_stream_blocks": BlockCut(
                arguments={
                    **_STREAMS,
                    "hidden_states_masks": Cut("image", 1),
                    "image_rotary_emb": Cut("joint", 1),
                },
                returns=("image", "text"),
                gathers_each=True,
            ),
            "single_stream_blocks": BlockCut(
                arguments={
                    **_ONE,
                    "hidden_states_masks": Cut("image", 1),
                    "image_rotary_emb": Cut("image", 1),
                },
                gathers_each=True,
            ),
        },
    ),
    "HunyuanVideoTransformer3DModel": _hunyuan(),
    "HunyuanVideoFramepackTransformer3DModel": _hunyuan(),
    "HunyuanImageTransformer2DModel": _hunyuan(),
    "HunyuanVideo15Transformer3DModel": TransformerSpec(
        blocks=("transformer_blocks",),
        cuts={
            "transformer_blocks": BlockCut(
                arguments={
                    **_STREAMS,
                    "attention_mask": Cut("text", 1),
                    "freqs_cis": Cut("image", 0),
                },
                returns=("image", "text"),
            )
        },
    ),
    "Ideogram4Transformer2DModel": TransformerSpec(
        blocks=("layers",),
        cuts={
            "layers": BlockCut(
                arguments={
                    **_ONE,
                    "image_rotary_emb": Cut("image", -2),
                    "adaln_input": Cut("image", 1),
                }
            )
        },
    ),
    "JoyImageEditTransformer3DModel": TransformerSpec(
        blocks=("double_blocks",),
        cuts={
            "double_blocks": BlockCut(
                arguments={
                    **_STREAMS,
                    "image_rotary_emb": (Cut("image", 0), Cut("text", 0)),
                },
                returns=("image", "text"),
            )
        },
    ),
    "Kandinsky5Transformer3DModel": TransformerSpec(
        blocks=("visual_transformer_blocks",),
        cuts={
            "visual_transformer_blocks": BlockCut(
                arguments={"visual_embed": Cut("image", 1), "rope": Cut("image", 1)}
            )
        },
        cross_attention=frozenset({"cross_attention"}),
    ),
    "Krea2Transformer2DModel": _one_stream("transformer_blocks", Cut("image", 0)),
    "LTXVideoTransformer3DModel": TransformerSpec(
        blocks=("transformer_blocks",),
        cuts={
            "transformer_blocks": BlockCut(
                arguments=_ONE | {"temb": Cut("image", 1), "image_rotary_emb": Cut("image", 1)}
            )
        },
        cross_attention=frozenset({"attn2"}),
    ),
    "LTX2VideoTransformer3DModel": TransformerSpec(
        blocks=("transformer_blocks",),
        cuts={
            "transformer_blocks": BlockCut(
                arguments=_ONE
                | dict.fromkeys(("temb", "temb_ca_scale_shift", "temb_ca_gate"), Cut("image", 1))
                | dict.fromkeys(("video_rotary_emb", "ca_video_rotary_emb"), Cut("image", -2)),
                returns=("image", "whole"),
            )
        },
        cross_attention=frozenset({"attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn"}),
        gathers_keys=frozenset({"video_to_audio_attn"}),
    ),
    "Lumina2Transformer2DModel": _one_stream("layers", Cut("image", 1)),
    "LuminaNextDiT2DModel": TransformerSpec(
        blocks=("layers",),
        cuts={"layers": BlockCut(arguments={**_ONE, "image_rotary_emb": Cut("image", 1)})},
        cross_attention=frozenset({"attn2"}),
    ),
    "OmniGenTransformer2DModel": _one_stream("layers", Cut("image", -2)),
}
"""Class name -> its row."""


def transformer_of(model: object) -> TransformerSpec | None:
    """Return the row of the model's class or of a base class; None if there is none."""
    names = [base.__name__ for base in type(model).__mro__]
    return next((TRANSFORMERS[name] for name in names if name in TRANSFORMERS), None)


def names_with(fact: str) -> list[str]:
    """Return the names of the classes whose rows have this fact, such as `has_stages`."""
    return sorted(name for name, row in TRANSFORMERS.items() if getattr(row, fact))

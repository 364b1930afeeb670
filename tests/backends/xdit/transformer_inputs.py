"""Parts of configurations and calls that tiny transformers share (transformer_cases.py)."""

from typing import Any

import torch
from torch import Tensor

HEADS = {"num_attention_heads": 4, "attention_head_dim": 8}
TEXT = 7


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape)


def padding(batch: int = 2, length: int = TEXT, *, kind: torch.dtype = torch.bool) -> Tensor:
    """The second text is two tokens shorter."""
    mask = torch.ones(batch, length, dtype=kind)
    mask[1:, -2:] = 0
    return mask


def steps(batch: int = 2) -> Tensor:
    return torch.tensor([500.0, 250.0])[:batch]


def grid(height: int, width: int) -> Tensor:
    """Positions (height * width, 3) of tokens."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(-1, 3).float()


def allegro_positions(*sides: int, dim: int = 4) -> tuple[Any, Any]:
    """Tables of angles for frames, rows and columns, and the entries of each token in them."""
    angles = [randn(side, dim) for side in sides]
    tables = tuple((each.cos(), each.sin()) for each in angles)
    tokens = torch.cartesian_prod(*map(torch.arange, sides))
    return tables, tuple(tokens[:, axis][None] for axis in range(len(sides)))


def image_and_text(*latents: int, text: int = 16, **others: Any) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, *latents),
        "encoder_hidden_states": randn(2, TEXT, text),
        "timestep": steps(),
        **others,
    }


def with_ids(channels: int, text: int, **others: Any) -> dict[str, Any]:
    ids = {"img_ids": grid(5, 6), "txt_ids": torch.zeros(TEXT, 3)}
    return image_and_text(30, channels, text=text) | ids | others


FLUX_LIKE = {"patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2}
FLUX_LIKE |= HEADS | {"joint_attention_dim": 32}
COG = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "patch_size": 2}
COGVIDEO = COG | HEADS | {"time_embed_dim": 4, "text_embed_dim": 16, "max_text_seq_length": TEXT}
COGVIDEO |= {"sample_width": 12, "sample_height": 10, "sample_frames": 5, "attention_head_dim": 16}
WAN = HEADS | {"attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16}
WAN |= {"freq_dim": 32, "ffn_dim": 32, "num_layers": 3, "rope_max_seq_len": 32}
SIZES = {name: torch.tensor([[10.0, 12.0]] * 2) for name in ("original_size", "target_size")}
SIZES["crop_coords"] = torch.zeros(2, 2)
HUNYUAN = HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_refiner_layers": 1}
HUNYUAN |= {"text_embed_dim": 16, "rope_axes_dim": (2, 2, 4), "patch_size": 1}
HUNYUAN_VIDEO = HUNYUAN | {"num_single_layers": 2, "patch_size_t": 1, "pooled_projection_dim": 8}
LTX = HEADS | {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 32, "num_layers": 2}
LTX |= {"caption_channels": 16}
LUMINA = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "num_layers": 2}
LUMINA |= {"num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 16, "norm_eps": 1e-5}


def hunyuan_video(**others: Any) -> dict[str, Any]:
    return image_and_text(
        4, 2, 4, 5, pooled_projections=randn(2, 8), encoder_attention_mask=padding(), **others
    )


def cogvideo_positions() -> tuple[Tensor, Tensor]:
    return randn(2 * 5 * 6, 16), randn(2 * 5 * 6, 16)


def ideogram() -> dict[str, Any]:
    text, image = 5, 20
    indicator = torch.tensor([[3] * text + [2] * image] * 2)
    segments = torch.ones(2, text + image, dtype=torch.long)
    segments[1, :2] = 0  # padding sees itself only
    positions = torch.cat((torch.zeros(text, 3), grid(4, 5) + 65536)).long()[None].expand(2, -1, -1)
    return {
        "hidden_states": randn(2, text + image, 8),
        "encoder_hidden_states": randn(2, text + image, 16),
        "timestep": torch.tensor([0.5, 0.25]),
        "position_ids": positions,
        "segment_ids": segments,
        "indicator": indicator,
    }


def omnigen() -> dict[str, Any]:
    text, image = 6, 20
    length = text + 1 + image
    mask = torch.ones(2, length, length).tril()
    mask[:, text:] = 1
    mask[1, :, :2] = 0
    return {
        "hidden_states": randn(2, 4, 8, 10),
        "timestep": torch.tensor([0.5, 0.25]),
        "input_ids": torch.arange(2 * text).view(2, text),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask,
        "position_ids": torch.arange(length).repeat(2, 1),
    }


def krea() -> dict[str, Any]:
    positions = torch.cat((torch.zeros(TEXT, 3), grid(5, 6)))
    return {
        "hidden_states": randn(2, 30, 8),
        "encoder_hidden_states": randn(2, TEXT, 2, 16),
        "timestep": torch.tensor([0.5, 0.25]),
        "position_ids": positions,
        "encoder_attention_mask": padding(),
    }

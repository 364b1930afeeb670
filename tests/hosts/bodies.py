"""The golden request bodies of both clients, with tiny contents where they name an image, a tensor
or a conditioning.

Sizes, steps and frames are as small as the tiny checkpoints; the keys and the kinds of values are
the clients'.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import checkpoint, sample_image
from tests.hosts.client import encode

STEPS = 2
SIDE = 64
Body = dict[str, Any]
IMAGE_TYPES = ("sd1", "sd2", "sdxl", "sd3", "flux", "hy", "pixa", "pixs", "zimage", "qwenimage")
COMFYUI_TEXT = {
    "seed": 7, "steps": STEPS, "cfg": 7.0, "clip_skip": 0, "denoise": 1.0, "denoising_end": 1.0,
    "positive": "a dog", "negative": "",
}  # fmt: skip
LOCALAI_TEXT = {
    "clip_skip": 0, "height": SIDE, "width": SIDE, "cfg": 6.0, "seed": -1, "steps": STEPS,
    "positive": "a dog", "negative": "",
}  # fmt: skip


def image(side: int = SIDE) -> str:
    return encode(sample_image(side))


def tensor(*shape: int, seed: int = 0) -> str:
    return encode(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def conditioning(type_name: str, seed: int) -> str:
    """What ComfyUI's text encoders give, in the widths of the tiny model."""
    folder = checkpoint(type_name)
    width = json.loads((folder / "unet" / "config.json").read_text())["cross_attention_dim"]
    pooled = json.loads((folder / "text_encoder_2" / "config.json").read_text())["projection_dim"]
    made = torch.Generator().manual_seed(seed)
    return encode(
        [
            [
                torch.randn(1, 77 + seed, width, generator=made),
                {"pooled_output": torch.randn(1, pooled, generator=made)},
            ]
        ]
    )


def full_sdxl() -> Body:
    """ComfyUI's asyncdiff node with everything connected."""
    return {
        **COMFYUI_TEXT, "steps": 5, "cfg": 6.5, "denoise": 0.6, "positive": "",
        "positive_embeds": conditioning("sdxl", 0), "negative_embeds": conditioning("sdxl", 1),
        "latent": tensor(1, 4, SIDE // 8, SIDE // 8),
        "sigmas": encode(torch.tensor([14.6, 7.0, 3.0, 1.0, 0.3, 0.0])),
        "ip_image": image(), "control_image": image(),
    }  # fmt: skip


def bodies(type_name: str, folder: Path) -> dict[str, Callable[[], Body]]:
    """Name -> body, for every golden body that is sent to this model type. folder: where LocalAI
    leaves its image.
    """
    if type_name in IMAGE_TYPES:
        found: dict[str, Callable[[], Body]] = {
            "ComfyUI": lambda: COMFYUI_TEXT,
            "LocalAI": lambda: LOCALAI_TEXT,
        }
        if type_name in ("sd1", "sd2", "sdxl"):
            found["ComfyUI distrifuser"] = lambda: {
                **COMFYUI_TEXT,
                "latent": tensor(1, 4, SIDE // 8, SIDE // 8),
                "ip_image": image(),
            }
            found["LocalAI distrifuser"] = lambda: {
                key: value for key, value in LOCALAI_TEXT.items() if key not in ("height", "width")
            }
        if type_name == "sdxl":
            found["ComfyUI full"] = full_sdxl
        return found
    video = {"seed": 1, "steps": STEPS, "frames": 3}
    svd = {**video, "decode_chunk_size": 2, "motion_bucket_id": 180, "noise_aug_strength": 0.01}
    ad = {
        **video,
        "positive": "waves",
        "cfg": 7.5,
        "negative": "blurry",
        "ip_image": image(),
        "control_image": image(),
    }
    wan = {**video, "frames": 5, "positive": "waves", "cfg": 5.0, "negative": ""}
    sdup = {"positive": "sharp", "seed": 1, "steps": STEPS, "cfg": 7.0}
    return {
        "ad": {
            "ComfyUI": lambda: ad,
            "ComfyUI A0": lambda: {**ad, "ip_image_scale": [100.0]},
            "LocalAI": lambda: LOCALAI_TEXT,
        },
        "flux2": {"LocalAI": lambda: LOCALAI_TEXT},
        "flux_kontext": {"LocalAI": lambda: LOCALAI_TEXT},
        "wan_t2v": {"ComfyUI": lambda: wan},
        "svd": {
            "ComfyUI": lambda: {**svd, "image": image()},
            "ComfyUI A0": lambda: {**svd, "image": image(), "image_scale": 100.0},
            "LocalAI": lambda: {
                **svd, "image": _file(folder), "height": SIDE, "width": SIDE, "cfg": 7.0,
                "seed": -1, "positive": "", "negative": "",
            },
        },
        "sdup": {
            "ComfyUI": lambda: {**sdup, "image": image(SIDE // 4), "negative": ""},
            "LocalAI": lambda: {**sdup, "image": _file(folder, SIDE // 4)},
        },
    }[type_name]  # fmt: skip


def _file(folder: Path, side: int = SIDE) -> str:
    """As LocalAI hands over the image of its caller: an image file without an ending."""
    path = folder / "b64123456"
    sample_image(side).save(path, format="PNG")
    return str(path)

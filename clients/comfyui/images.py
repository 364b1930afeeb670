"""ComfyUI's image tensors <-> the files that a host reads and sends."""

import base64
import io

import numpy as np
import torch
from PIL import Image


def encode_image(images: torch.Tensor) -> str:
    """Return base64 of a PNG of the first image. images: float (B, H, W, C) in [0, 1]."""
    return _png(_bytes(images[0]))


def encode_mask(masks: torch.Tensor) -> str:
    """Return base64 of a grey PNG of the first mask; white may change.

    masks: float (B, H, W) or (H, W) in [0, 1].
    """
    return _png(_bytes(masks if masks.ndim == 2 else masks[0]))


def decode_frames(data: bytes) -> torch.Tensor:
    """Return float32 (N, H, W, 3) in [0, 1] from a .npy file of uint8 (N, H, W, 3)."""
    return torch.from_numpy(
        np.load(io.BytesIO(data), allow_pickle=False).astype(np.float32) / 255.0
    )


def _bytes(image: torch.Tensor) -> np.ndarray:
    return (image.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def _png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")

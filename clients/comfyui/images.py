"""ComfyUI's image tensors <-> what a host reads and sends."""

import base64
import io

import numpy as np
import torch
from PIL import Image


def encode_image(images: torch.Tensor) -> str:
    """float (B, H, W, C) in [0, 1] -> base64 of a PNG of the first."""
    return _png(_bytes(images[0]))


def encode_mask(masks: torch.Tensor) -> str:
    """float (B, H, W) or (H, W) in [0, 1] -> base64 of a grey PNG of the first; white is what may
    change.
    """
    return _png(_bytes(masks if masks.ndim == 2 else masks[0]))


def decode_frames(data: bytes) -> torch.Tensor:
    """A numpy file of uint8 (N, H, W, 3) -> float32 of the same shape in [0, 1]."""
    return torch.from_numpy(
        np.load(io.BytesIO(data), allow_pickle=False).astype(np.float32) / 255.0
    )


def _bytes(image: torch.Tensor) -> np.ndarray:
    return (image.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def _png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")

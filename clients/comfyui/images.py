"""ComfyUI's image tensors <-> what a host reads and sends."""

import base64
import io

import numpy as np
import torch
from diffusion_client import HostError
from PIL import Image


def encode_image(name: str, images: torch.Tensor) -> str:
    """float (1, H, W, C) in [0, 1] -> base64 of a PNG. HostError with the input's name for a batch
    of several.
    """
    return _png(_bytes(_only(name, images)))


def encode_images(images: torch.Tensor) -> str | list[str]:
    """float (B, H, W, C) -> one PNG, or a list of them for an input that may have several."""
    encoded = [_png(_bytes(image)) for image in images]
    return encoded[0] if len(encoded) == 1 else encoded


def encode_mask(name: str, masks: torch.Tensor) -> str:
    """float (1, H, W) or (H, W) in [0, 1] -> base64 of a grey PNG; white is what may change."""
    return _png(_bytes(masks if masks.ndim == 2 else _only(name, masks)))


def decode_frames(data: bytes) -> torch.Tensor:
    """A numpy file of uint8 (N, H, W, 3) -> float32 of the same shape in [0, 1]."""
    return frames_of(np.load(io.BytesIO(data), allow_pickle=False))


def frames_of(frames: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> float32 of the same shape in [0, 1]."""
    return torch.from_numpy(frames.astype(np.float32) / 255.0)


def _only(name: str, batch: torch.Tensor) -> torch.Tensor:
    if len(batch) != 1:
        raise HostError(
            f"{name} is a batch of {len(batch)}, and one is allowed. Choose one of them, for "
            "example with ImageFromBatch, or queue the workflow once for each.",
            status=400,
        )
    return batch[0]


def _bytes(image: torch.Tensor) -> np.ndarray:
    return (image.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def _png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")

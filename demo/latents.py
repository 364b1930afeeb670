"""The fixed linear latent: 16 coefficients of an 8x8 block DCT in an opponent colour basis.

The coefficients are softly whitened. A fixed definition lets the UNet train without a VAE and be
judged through the exact linear inverse. The checkpoint's AutoencoderKL is then trained to map
images to these latents and back.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 8
CHANNELS = 16
# Measured once on 400 images: mean of the three DC coefficients, and std ** -0.6 times one common
# factor.
MEAN = (2.5610382, 0.7817863, 0.4129525) + (0.0,) * 13
SCALE = (
    *(0.1705733, 0.1889774, 0.2569761, 0.6412376, 0.6982330, 0.9359400, 0.6544919, 0.7257248),
    *(0.9678027, 1.0724305, 1.1567703, 1.5290035, 1.0893352, 1.1756270, 1.0980561, 1.1929225),
)


def _basis() -> Tensor:
    """(16, 3, 8, 8) orthonormal kernels: (0,0) (0,1) (1,0) (1,1) of all colours, (0,2) (2,0) of the
    first two.
    """
    cosines = [
        [
            math.cos(math.pi * (2 * n + 1) * k / 16) * math.sqrt((1 if k == 0 else 2) / 8)
            for n in range(8)
        ]
        for k in range(8)
    ]
    dct = torch.tensor(cosines)
    colours = F.normalize(
        torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]]), dim=1
    )
    chosen = [(c, a, b) for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)) for c in range(3)]
    chosen += [(c, a, b) for a, b in ((0, 2), (2, 0)) for c in range(2)]
    return torch.stack(
        [torch.einsum("c,y,x->cyx", colours[c], dct[a], dct[b]) for c, a, b in chosen]
    )


BASIS = _basis()
_MEAN = torch.tensor(MEAN)[None, :, None, None]
_SCALE = torch.tensor(SCALE)[None, :, None, None]


def to_latents(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) float32 in [-1, 1] -> (B, 16, H/8, W/8) float32."""
    return (F.conv2d(pixels, BASIS, stride=BLOCK) - _MEAN) * _SCALE


def to_pixels(latents: Tensor) -> Tensor:
    """The linear inverse (about 31 dB): (B, 16, h, w) -> (B, 3, 8h, 8w) in [-1, 1]."""
    return F.conv_transpose2d(latents / _SCALE + _MEAN, BASIS, stride=BLOCK).clamp(-1, 1)


def from_uint8(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8."""
    return ((pixels.permute(0, 2, 3, 1) + 1) * 127.5).round().clip(0, 255).to(torch.uint8).numpy()

"""Enlarges images with a network of ESRGAN's kind, tile by tile. Every rank does the same."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from backends.errors import ConfigError
from backends.loading.upscaling.rrdb import RRDBNet, shape_of, with_our_names
from backends.model_table import ModelSpec
from backends.request import Array, GenerateRequest, enlarges_only, require_room

TILE, OVERLAP = 192, 16
"""Pixels of a side that are computed at once, and those beyond them that are computed too, so that
no seam shows: with three dense blocks in a row the influence of farther pixels is small.
"""
NESTED = ("params_ema", "params", "state_dict")
"""Keys under which training programs keep weights, the preferred first."""


class Upscaler:
    """One network. It is in main memory, and on the device while it enlarges."""

    def __init__(self, path: str, *, device: torch.device, dtype: torch.dtype) -> None:
        """Read the weights. ConfigError if they are of another kind."""
        weights = with_our_names(_read(path))
        shape = shape_of(weights)
        if shape is None:
            raise ConfigError(
                f"--upscalers={path} is no upscaler of ESRGAN's kind (RRDBNet). Give one, such as "
                "RealESRGAN_x4plus.pth."
            )
        self.scale = shape.scale
        self._fold = shape.fold
        self._device, self._dtype = device, dtype
        self._network = RRDBNet(shape).eval().requires_grad_(False)
        try:
            self._network.load_state_dict(weights)
        except RuntimeError as error:
            raise ConfigError(
                f"--upscalers={path} does not fit ESRGAN's network: "
                f"{' '.join(str(error).split())[:300]}. Download it again, or give another one."
            ) from error

    def require_room(self, width: int, height: int) -> None:
        """Raise RequestError for an image that would become too large."""
        require_room(width, height, self.scale)

    @torch.no_grad()
    def enlarge(self, frames: Array) -> Array:
        """uint8 (N, H, W, 3) -> uint8 (N, scale * H, scale * W, 3)."""
        self._network.to(self._device, self._dtype)
        try:
            return np.stack([self._enlarged(frame) for frame in frames])
        finally:
            self._network.to("cpu", torch.float32)

    def _enlarged(self, frame: Array) -> Array:
        height, width, _ = frame.shape
        image = torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 255
        large = torch.empty(3, height * self.scale, width * self.scale)
        for top in range(0, height, TILE):
            for left in range(0, width, TILE):
                rows, columns = slice(top, top + TILE), slice(left, left + TILE)
                self._paste(large, image, rows, columns)
        return (large.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()

    def _paste(self, large: Tensor, image: Tensor, rows: slice, columns: slice) -> None:
        """Compute one tile with what is around it, and put the tile into the large image."""
        (top, above), (left, before) = (
            (max(0, part.start - OVERLAP), min(OVERLAP, part.start)) for part in (rows, columns)
        )
        tile = image[..., top : rows.stop + OVERLAP, left : columns.stop + OVERLAP]
        height, width = tile.shape[2:]
        beyond = (0, -width % self._fold, 0, -height % self._fold)
        tile = functional.pad(tile, beyond, mode="replicate").to(self._device, self._dtype)
        made = self._network(tile)[0].float().cpu()
        place = large[
            :,
            rows.start * self.scale : rows.stop * self.scale,
            columns.start * self.scale : columns.stop * self.scale,
        ]
        above, before = above * self.scale, before * self.scale
        place.copy_(made[:, above : above + place.shape[1], before : before + place.shape[2]])


class Upscalers:
    """Those of a host, by name."""

    def __init__(
        self, files: Mapping[str, str], *, device: torch.device, dtype: torch.dtype
    ) -> None:
        """files: name -> path. ConfigError for one that holds no such network."""
        self._named = {
            name: Upscaler(path, device=device, dtype=dtype) for name, path in files.items()
        }

    def named(self, name: str) -> Upscaler:
        return self._named[name]

    def check(self, request: GenerateRequest, spec: ModelSpec) -> None:
        """Raise RequestError if the request's upscaler would make too large an image."""
        if request.upscaler is None:
            return
        size = request.width or spec.width, request.height or spec.height
        if enlarges_only(request):
            size = request.init_image.size
        self.named(request.upscaler).require_room(*size)


def _read(path: str) -> Mapping[str, Tensor]:
    """Return the weights of a file. ConfigError if it holds none."""
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"--upscalers={path} cannot be read: {' '.join(str(error).split())[:200]}. Download it "
            "again, or give a .safetensors file."
        ) from error
    for key in NESTED:
        found = found.get(key, found) if isinstance(found, Mapping) else found
    tensors = isinstance(found, Mapping) and all(isinstance(v, Tensor) for v in found.values())
    if not tensors:
        raise ConfigError(f"--upscalers={path} holds no weights. Give a file of weights.")
    return found

"""ComfyUI nodes for a host of diffusion-launcher. Link this folder into ComfyUI's custom_nodes."""

import sys
from pathlib import Path

_CLIENT = Path(__file__).resolve().parents[1] / "python"
if str(_CLIENT) not in sys.path:
    sys.path.append(
        str(_CLIENT)
    )  # the client library is beside this folder, even if the folder is linked

from .nodes import DiffusionHost, DiffusionSampler  # noqa: E402  after the path is set

NODE_CLASS_MAPPINGS = {"DiffusionHost": DiffusionHost, "DiffusionSampler": DiffusionSampler}
NODE_DISPLAY_NAME_MAPPINGS = {
    "DiffusionHost": "Diffusion Host",
    "DiffusionSampler": "Diffusion Sampler",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

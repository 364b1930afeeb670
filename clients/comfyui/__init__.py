"""ComfyUI nodes for a host of diffusion-launcher. Link this folder into ComfyUI's custom_nodes."""

import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
# the client library is inside the published folder, and beside this one in the repository
_CLIENT = _HERE if (_HERE / "diffusion_client").is_dir() else _HERE.parent / "python"
if str(_CLIENT) not in sys.path:
    sys.path.append(str(_CLIENT))

from .latent_nodes import DiffusionKSampler, DiffusionLora  # noqa: E402  after the path is set
from .nodes import DiffusionHost, DiffusionSampler  # noqa: E402

NODE_CLASS_MAPPINGS = {
    "DiffusionHost": DiffusionHost,
    "DiffusionSampler": DiffusionSampler,
    "DiffusionKSampler": DiffusionKSampler,
    "DiffusionLora": DiffusionLora,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "DiffusionHost": "Diffusion Host",
    "DiffusionSampler": "Diffusion Sampler",
    "DiffusionKSampler": "Diffusion KSampler",
    "DiffusionLora": "Diffusion LoRA",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

"""Tiny checkpoints for tests: the real diffusers layout of all model types at 1 to 10 MB each, with
random weights.

Everything is built on first use and kept in a cache folder outside the repository (cache.py), so
asking again costs nothing: neither torch nor diffusers is imported for something that is already
there. Nothing is downloaded.

    folder = checkpoint("flux")  # a folder for from_pretrained(folder, local_files_only=True)
    folder = checkpoint("flux", num_layers=6)  # other keywords go to the denoiser's config
    folder = checkpoint("sd3", **SD35_MEDIUM)  # the 3.5-medium layout
    pipe = load("flux")  # the same, loaded (float32, CPU)
    image = pipe(**inputs("flux", prompt="a red car")).images
    pipe.load_lora_weights(lora("flux"))  # likewise controlnet, ip_adapter, motion_lora, gguf, ...
"""

import os

os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # before diffusers is first imported: a test must never reach for the network
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

from tests.checkpoints.adapters import (
    IP_ADAPTER_FILE,
    IP_ADAPTER_IMAGE_ENCODER,
    controlnet,
    ip_adapter,
    motion_adapter,
    motion_lora,
)
from tests.checkpoints.factory import NAMES, SD35_MEDIUM, checkpoint, inputs, load, sample_image
from tests.checkpoints.lora import lora
from tests.checkpoints.single_file import gguf, single_file

__all__ = [
    "IP_ADAPTER_FILE",
    "IP_ADAPTER_IMAGE_ENCODER",
    "NAMES",
    "SD35_MEDIUM",
    "checkpoint",
    "controlnet",
    "gguf",
    "inputs",
    "ip_adapter",
    "load",
    "lora",
    "motion_adapter",
    "motion_lora",
    "sample_image",
    "single_file",
]

"""Checkpoints large enough for options to show a cost, with files that go with them.

Random weights, built once in the tests' cache. sdxl: a UNet of 110 M parameters; sd3: a transformer
of 74 M. Text encoders and VAE are the tests' tiny ones.
"""

from pathlib import Path

import torch
from diffusers import ControlNetModel
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.torch import load_file, save_file

from tests.checkpoints import (
    IP_ADAPTER_FILE,
    IP_ADAPTER_IMAGE_ENCODER,
    checkpoint,
    ip_adapter,
    load,
    sample_image,
)
from tests.checkpoints.adapters import IP_ADAPTERS
from tests.checkpoints.lora import PROJECTION, factors

DENOISERS = {
    "sdxl": {
        "sample_size": 64,
        "block_out_channels": (96, 192, 384),
        "transformer_layers_per_block": (1, 2, 4),
        "attention_head_dim": (3, 6, 12),
        "norm_num_groups": 32,
    },
    "sd3": {
        "sample_size": 64,
        "num_layers": 8,
        "num_attention_heads": 8,
        "attention_head_dim": 64,
        "pos_embed_max_size": 64,
    },
}
PARTS = {"sdxl": "unet", "sd3": "transformer"}


def folder_of(name: str) -> Path:
    return checkpoint(name, **DENOISERS[name])


def weights_of(name: str) -> dict[str, torch.Tensor]:
    return load_file(folder_of(name) / PARTS[name] / "diffusion_pytorch_model.safetensors")


def lora_file(name: str, folder: Path, *, seed: int) -> Path:
    """Write a LoRA of rank 16 on every attention projection."""
    targets = {
        key.removesuffix(".weight"): weight
        for key, weight in weights_of(name).items()
        if PROJECTION.search(key)
    }
    tensors = {}
    for layer, (down, up) in factors(targets, seed=seed, rank=16).items():
        tensors |= {
            f"{PARTS[name]}.{layer}.lora_A.weight": down,
            f"{PARTS[name]}.{layer}.lora_B.weight": 0.1 * up,
        }
    save_file(tensors, folder / f"lora{seed}.safetensors")
    return folder / f"lora{seed}.safetensors"


def controlnet_folder(folder: Path) -> Path:
    ControlNetModel.from_unet(load("sdxl", **DENOISERS["sdxl"]).unet).save_pretrained(
        folder / "controlnet"
    )
    return folder / "controlnet"


def ip_adapter_file(folder: Path) -> Path:
    """Write an IP-Adapter for the larger UNet, with the tests' image encoder beside it."""
    tensors = IP_ADAPTERS["sdxl"](load("sdxl", **DENOISERS["sdxl"]))
    path = folder / "ip" / IP_ADAPTER_FILE
    path.parent.mkdir(parents=True)
    save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, path)
    (folder / "ip" / IP_ADAPTER_IMAGE_ENCODER).symlink_to(
        ip_adapter("sdxl") / IP_ADAPTER_IMAGE_ENCODER
    )
    return path


def gguf_file(name: str, folder: Path, kind: str) -> Path:
    return write_gguf(
        folder_of(name) / PARTS[name] / "diffusion_pytorch_model.safetensors",
        folder / f"{kind}.gguf",
        kind,
    )


def write_gguf(source: Path, path: Path, kind: str) -> Path:
    """Write matrices whose width is a multiple of 32 as blocks of `kind`, the rest as float32."""
    writer = GGUFWriter(path, source.parent.name)
    packed = GGMLQuantizationType[kind]
    for key, tensor in load_file(source).items():
        array = tensor.float().numpy()
        is_matrix = tensor.dim() == 2 and key.endswith(".weight") and tensor.shape[1] % 32 == 0
        writer.add_tensor(
            key,
            quantize(array, packed) if is_matrix else array,
            raw_dtype=packed if is_matrix else None,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def hint():
    return sample_image(512)

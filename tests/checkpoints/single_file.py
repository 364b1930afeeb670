"""One-file checkpoints: whole pipelines in the layout of the original Stable Diffusion code, and
quantised denoisers (GGUF).
"""

from pathlib import Path
from typing import TYPE_CHECKING

from tests.checkpoints.cache import cached
from tests.checkpoints.factory import NAMES, checkpoint, load

if TYPE_CHECKING:
    from torch import Tensor

ENCODERS = {
    "sd3": ("clip_l", "clip_g", "t5xxl"),
    "flux": ("clip_l", "t5xxl"),
}
"""Name -> the parts of `text_encoders.` in files of ComfyUI's layout, in the pipeline's order."""
GGUF_NAMES = (
    "sd1",
    "sd2",
    "sdup",
    "sdxl",
    "sd3",
    "flux",
    "flux_kontext",
    "zimage",
    "qwenimage",
    "flux2",
    "wan_t2v",
)
GGUF_TYPES = (
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q5_1",
    "Q5_0",
    "Q4_1",
    "Q4_0",
)  # what the gguf package can write
GGUF_BLOCK = 32  # weights that share a scale: narrower layers stay unquantised

Weights = dict[str, "Tensor"]


def single_file(name: str, *, seed: int = 0, holds: tuple[str, ...] | None = None) -> Path:
    """Return a .safetensors file with weights of checkpoint(name, seed=seed).

    sd1, sd2, sdxl: the whole pipeline in the original layout, for Pipeline.from_single_file(file,
    config=folder, local_files_only=True).
    Others: the transformer, of sd3 in the original names, else in diffusers'. holds: components
    beside it (sd3, flux), as ComfyUI's files have them.
    """

    def build(folder: Path) -> None:
        from safetensors.torch import save_file

        source = checkpoint(name, seed=seed)
        is_unet = (source / "unet").is_dir()
        weights = _original_layout(name, source) if is_unet else _transformer(name, source, holds)
        save_file(
            {key: tensor.contiguous() for key, tensor in weights.items()},
            folder / f"{name}.safetensors",
        )

    recipe = {"seed": seed, "holds": list(holds or ())}
    return cached(f"{name}-single-file", recipe, build) / f"{name}.safetensors"


def _transformer(name: str, source: Path, holds: tuple[str, ...] | None) -> Weights:
    """A transformer alone has no prefix."""
    from safetensors.torch import load_file

    from tests.checkpoints import original_names

    weights = load_file(source / "transformer" / "diffusion_pytorch_model.safetensors")
    weights = original_names.sd3(weights) if name == "sd3" else weights
    if holds is None:
        return weights
    weights = _prefixed("model.diffusion_model.", weights)
    if "vae" in holds:
        vae = load_file(source / "vae" / "diffusion_pytorch_model.safetensors")
        prefix = "vae." if name == "flux" else "first_stage_model."
        weights |= _prefixed(prefix, original_names.vae(vae))
    for number, part in enumerate(ENCODERS[name]):
        component = "text_encoder" + (f"_{number + 1}" if number else "")
        if component in holds:
            own = load_file(source / component / "model.safetensors")
            head = own.pop("text_projection.weight", None)
            own = own if part == "t5xxl" else original_names.clip(own)
            if part == "clip_g":  # that of clip_l is the identity, and left out
                own["text_projection.weight"] = head
            weights |= _prefixed(f"text_encoders.{part}.transformer.", own)
    return weights


def gguf(name: str, quantization: str = "Q8_0", *, seed: int = 0) -> Path:
    """Return a .gguf file of checkpoint(name)'s denoiser with diffusers' keys: linear weights
    quantised, all else float32.
    """
    if name in NAMES and name not in GGUF_NAMES:
        raise ValueError(
            f"diffusers reads no GGUF file of type {name!r}. Allowed: {', '.join(GGUF_NAMES)}."
        )
    if quantization not in GGUF_TYPES:
        raise ValueError(
            f"quantization={quantization!r} cannot be written. Allowed: {', '.join(GGUF_TYPES)}."
        )

    def build(folder: Path) -> None:
        import torch
        from gguf import GGMLQuantizationType, GGUFWriter
        from gguf.quants import quantize

        parts = load(name, seed=seed).components
        denoiser = parts["transformer"] if "transformer" in parts else parts["unet"]
        linear = {
            f"{path}.weight"
            for path, module in denoiser.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        kind = GGMLQuantizationType[quantization]
        writer = GGUFWriter(folder / f"{name}.gguf", name)
        for key, tensor in denoiser.state_dict().items():
            array = tensor.float().numpy()
            if key in linear and tensor.shape[1] % GGUF_BLOCK == 0:
                writer.add_tensor(key, quantize(array, kind), raw_dtype=kind)
            else:
                writer.add_tensor(key, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return (
        cached(f"{name}-gguf", {"quantization": quantization, "seed": seed}, build) / f"{name}.gguf"
    )


def _original_layout(name: str, source: Path) -> Weights:
    """All models of the checkpoint folder `source` under their original names."""
    from safetensors.torch import load_file

    from tests.checkpoints import original_names

    unet = load_file(source / "unet" / "diffusion_pytorch_model.safetensors")
    vae = load_file(source / "vae" / "diffusion_pytorch_model.safetensors")
    first = load_file(source / "text_encoder" / "model.safetensors")
    weights = _prefixed("model.diffusion_model.", original_names.unet(unet)) | _prefixed(
        "first_stage_model.", original_names.vae(vae)
    )
    if name == "sd1":
        return weights | _prefixed("cond_stage_model.transformer.", original_names.clip(first))
    if name == "sd2":
        return weights | _prefixed("cond_stage_model.model.", original_names.open_clip(first))
    second = load_file(source / "text_encoder_2" / "model.safetensors")
    weights |= _prefixed("conditioner.embedders.0.transformer.", original_names.clip(first))
    return weights | _prefixed("conditioner.embedders.1.model.", original_names.open_clip(second))


def _prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + key: tensor for key, tensor in weights.items()}

"""Adapters for the tiny checkpoints: ControlNet, IP-Adapter, motion adapter and motion LoRA. LoRA
files are in lora.py.

Weights that training starts at zero (a ControlNet's output convolutions) are random here, otherwise
nothing would change.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tests.checkpoints.cache import cached
from tests.checkpoints.factory import checkpoint, load

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin
    from torch import Tensor, nn

IP_ADAPTER_FILE = Path("models", "ip-adapter.safetensors")
IP_ADAPTER_IMAGE_ENCODER = Path("models", "image_encoder")
IP_TOKENS = 4  # per image


def controlnet(name: str, *, seed: int = 0) -> Path:
    """Return a folder with a ControlNet for checkpoint(name): sd1 (also for ad), sd2, sdxl, sd3,
    flux, hy, zimage or qwenimage.
    """
    build = _one_of(CONTROLNETS, name, "ControlNet")
    return cached(
        f"{name}-controlnet",
        {"seed": seed},
        lambda folder: _build(lambda: build(load(name)), folder, seed, _fill_zeros),
    )


def _controlnet_unet(pipe: "DiffusionPipeline") -> "ModelMixin":
    from diffusers import ControlNetModel

    # Four widths make three halvings, the VAE's factor of 8.
    model = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
    for layer in (model.controlnet_cond_embedding.conv_in, *model.controlnet_cond_embedding.blocks):
        layer.weight.data.mul_(
            2.5
        )  # at their initial size, seven layers each lose more than half of the hint
    return model


def _controlnet_sd3(pipe: "DiffusionPipeline") -> "ModelMixin":
    from diffusers import SD3ControlNetModel

    return SD3ControlNetModel.from_transformer(
        pipe.transformer, num_layers=2, num_extra_conditioning_channels=0
    )


def _controlnet_flux(pipe: "DiffusionPipeline") -> "ModelMixin":
    from diffusers import FluxControlNetModel

    heads = {
        field: pipe.transformer.config[field]
        for field in ("attention_head_dim", "num_attention_heads")
    }
    return FluxControlNetModel.from_transformer(
        pipe.transformer, num_layers=2, num_single_layers=2, **heads
    )


def _controlnet_hunyuan(pipe: "DiffusionPipeline") -> "ModelMixin":
    """Not by from_transformer, which reads a config field that the transformer does not have."""
    from diffusers import HunyuanDiT2DControlNetModel

    config = dict(pipe.transformer.config)
    fields = (
        "num_attention_heads",
        "attention_head_dim",
        "in_channels",
        "patch_size",
        "activation_fn",
        "sample_size",
        "hidden_size",
    )
    fields += (
        "cross_attention_dim",
        "cross_attention_dim_t5",
        "pooled_projection_dim",
        "text_len",
        "text_len_t5",
    )
    fields += ("use_style_cond_and_image_meta_size", "mlp_ratio")
    return HunyuanDiT2DControlNetModel(
        transformer_num_layers=config["num_layers"], **{field: config[field] for field in fields}
    )


def _controlnet_zimage(pipe: "DiffusionPipeline") -> "ModelMixin":
    """Holds the control's own layers; the pipeline lends it the transformer's embedders and
    refiners.
    """
    from diffusers import ZImageControlNetModel

    config = pipe.transformer.config
    shared = {
        field: config[field] for field in ("dim", "n_refiner_layers", "n_heads", "n_kv_heads")
    }
    return ZImageControlNetModel(
        control_layers_places=[0, 2], control_in_dim=config["in_channels"], **shared
    )


def _controlnet_qwenimage(pipe: "DiffusionPipeline") -> "ModelMixin":
    from diffusers import QwenImageControlNetModel

    heads = {
        field: pipe.transformer.config[field]
        for field in ("attention_head_dim", "num_attention_heads")
    }
    return QwenImageControlNetModel.from_transformer(pipe.transformer, num_layers=2, **heads)


CONTROLNETS: dict[str, Callable[["DiffusionPipeline"], "ModelMixin"]] = {
    "sd1": _controlnet_unet,
    "sd2": _controlnet_unet,
    "sdxl": _controlnet_unet,
    "sd3": _controlnet_sd3,
    "flux": _controlnet_flux,
    "hy": _controlnet_hunyuan,
    "zimage": _controlnet_zimage,
    "qwenimage": _controlnet_qwenimage,
}


def motion_adapter(*, seed: int = 0) -> Path:
    """Return a folder with a motion adapter that turns checkpoint("sd1") into an AnimateDiff
    pipeline.
    """
    from tests.checkpoints import denoisers

    return cached(
        "motion-adapter",
        {"seed": seed},
        lambda folder: _build(denoisers.motion_adapter, folder, seed, _fill_zeros),
    )


def motion_lora(*, seed: int = 0, rank: int = 4) -> Path:
    """Return a .safetensors file for checkpoint("ad"): a LoRA on the motion modules alone, in the
    layout of the published ones.
    """

    def build(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        from tests.checkpoints.lora import PROJECTION, factors

        weights = load_file(
            checkpoint("ad") / "motion_adapter" / "diffusion_pytorch_model.safetensors"
        )
        targets = {
            key.removesuffix(".weight"): weight
            for key, weight in weights.items()
            if PROJECTION.search(key)
        }
        tensors = {}
        for name, (down, up) in factors(targets, seed=seed, rank=rank).items():
            attention, projection = name.removesuffix(".0").rsplit(".", 1)
            tensors[f"unet.{attention}.processor.{projection}_lora.down.weight"] = down
            tensors[f"unet.{attention}.processor.{projection}_lora.up.weight"] = up
        save_file(tensors, folder / "motion_lora.safetensors")

    return cached("motion-lora", {"seed": seed, "rank": rank}, build) / "motion_lora.safetensors"


def ip_adapter(name: str, *, seed: int = 0) -> Path:
    """Return a folder with an IP-Adapter for checkpoint(name): ad, sd1, sd2, sdxl, sd3 or flux.

    The folder has the published layout: IP_ADAPTER_FILE and IP_ADAPTER_IMAGE_ENCODER below it. sd3
    and flux want the image encoder's whole path, the others the path within the folder.
    """
    build = _one_of(IP_ADAPTERS, name, "IP-Adapter")

    def save(folder: Path) -> None:
        import torch
        from safetensors.torch import save_file

        from tests.checkpoints import parts, saving

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tensors = build(load(name))
            encoder, processor = (
                parts.siglip_vision()
                if name == "sd3"
                else (parts.clip_vision(), parts.image_processor())
            )
        (folder / IP_ADAPTER_FILE).parent.mkdir()
        save_file(
            {key: tensor.detach().contiguous() for key, tensor in tensors.items()},
            folder / IP_ADAPTER_FILE,
        )
        saving.save(encoder, folder / IP_ADAPTER_IMAGE_ENCODER)
        processor.save_pretrained(folder / IP_ADAPTER_IMAGE_ENCODER)

    return cached(f"{name}-ip-adapter", {"seed": seed}, save)


def _ip_adapter_unet(pipe: "DiffusionPipeline") -> dict[str, "Tensor"]:
    """Keys and values for the cross-attention layers, numbered 1, 3, 5, ... in the order of the
    UNet's processors.
    """
    import torch

    cross = pipe.unet.config.cross_attention_dim
    tensors = _image_projection(cross)
    layers = [
        name
        for name in pipe.unet.attn_processors
        if "attn2" in name and "motion_modules" not in name
    ]
    for number, name in enumerate(layers):
        width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for part in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{2 * number + 1}.{part}.weight"] = (
                2 * torch.randn(width, cross) / cross**0.5
            )
    return tensors


def _ip_adapter_flux(pipe: "DiffusionPipeline") -> dict[str, "Tensor"]:
    """Keys and values for the double blocks, numbered from 0."""
    import torch

    joint, width = pipe.transformer.config.joint_attention_dim, pipe.transformer.inner_dim
    tensors = _image_projection(joint)
    for number in range(pipe.transformer.config.num_layers):
        for part in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{number}.{part}.weight"] = torch.randn(width, joint) / joint**0.5
            tensors[f"ip_adapter.{number}.{part}.bias"] = torch.zeros(width)
    return tensors


def _ip_adapter_sd3(pipe: "DiffusionPipeline") -> dict[str, "Tensor"]:
    """A resampler that knows the timestep, and keys and values for every block. Its heads are 64
    wide in code, so there is one.
    """
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
    from diffusers.models.embeddings import IPAdapterTimeImageProjection

    from tests.checkpoints.parts import WIDTH

    config = pipe.transformer.config
    inner = config.num_attention_heads * config.attention_head_dim
    projection = IPAdapterTimeImageProjection(
        embed_dim=WIDTH,
        output_dim=inner,
        hidden_dim=WIDTH,
        heads=1,
        num_queries=IP_TOKENS,
        timestep_in_dim=WIDTH,
    )
    tensors = {f"image_proj.{key}": tensor for key, tensor in projection.state_dict().items()}
    for number in range(config.num_layers):
        processor = SD3IPAdapterJointAttnProcessor2_0(
            inner, inner, config.attention_head_dim, timesteps_emb_dim=WIDTH
        )
        tensors |= {
            f"ip_adapter.{number}.{key}": tensor for key, tensor in processor.state_dict().items()
        }
    return tensors


IP_ADAPTERS: dict[str, Callable[["DiffusionPipeline"], dict[str, "Tensor"]]] = {
    "ad": _ip_adapter_unet,
    "sd1": _ip_adapter_unet,
    "sd2": _ip_adapter_unet,
    "sdxl": _ip_adapter_unet,
    "sd3": _ip_adapter_sd3,
    "flux": _ip_adapter_flux,
    "flux_kontext": _ip_adapter_flux,
    "chroma": _ip_adapter_flux,
}


def _image_projection(width: int) -> dict[str, "Tensor"]:
    """The layer that makes IP_TOKENS tokens of `width` from an image embedding."""
    import torch

    from tests.checkpoints.parts import WIDTH

    return {
        "image_proj.proj.weight": torch.randn(IP_TOKENS * width, WIDTH) / WIDTH**0.5,
        "image_proj.proj.bias": torch.zeros(IP_TOKENS * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }


def _one_of(builders: dict[str, Callable], name: str, what: str) -> Callable:
    if name not in builders:
        raise ValueError(f"There is no {what} for type {name!r}. Allowed: {', '.join(builders)}.")
    return builders[name]


def _build(
    make: Callable[[], "ModelMixin"], folder: Path, seed: int, change: Callable[["nn.Module"], None]
) -> None:
    """Make a model from `seed` alone, change it and save it."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        change(model)
    model.save_pretrained(folder)


def _fill_zeros(module: "nn.Module") -> None:
    """Give parameters that are all zero, biases apart, random values."""
    for name, parameter in module.named_parameters():
        if not parameter.any() and not name.endswith("bias"):
            parameter.data.normal_(std=0.3)

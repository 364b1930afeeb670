"""Files as people have them draw what their weights say: prefixes, 8-bit scales, GGUF in original
names, and v-prediction.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from torch import Tensor

from backends.errors import ConfigError
from backends.generation.pipeline import LoadedPipeline, load_pipeline
from backends.loading.plain_weights import unpacked
from backends.model_table import read_table
from backends.request import GenerateRequest, LoadRequest
from tests.altered import WEIGHTS, linked, without_a_weight
from tests.checkpoints import (
    NAMES,
    checkpoint,
    controlnet,
    ip_adapter,
    lora,
    motion_adapter,
    single_file,
)
from tests.checkpoints.adapters import CONTROLNETS, IP_ADAPTER_FILE
from tests.checkpoints.original_names import ltx as original_ltx
from tests.checkpoints.original_names import unet as original_unet
from tests.checkpoints.original_names import zimage as original_zimage
from tests.every_type import EVERY_TYPE

TABLE = read_table()
CPU = torch.device("cpu")
PREFIX = "model.diffusion_model."
SPELLINGS = (".scale_weight", ".weight_scale")
UNETS = ("sd1", "sd2", "sdxl", "sdup")
Weights = dict[str, Tensor]


def loaded(name: str, source: Path | None = None, **options: object) -> LoadedPipeline:
    request = LoadRequest(
        model_type=name,
        checkpoint=str(source or checkpoint(name)),
        variant="fp32",
        height=64,
        width=64,
        **options,
    )
    return load_pipeline(TABLE[name], request, device=CPU)


def refusal(name: str, source: Path | None = None, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(name, source, **options)
    return str(caught.value)


def draw(pipeline: LoadedPipeline, **fields: object) -> np.ndarray:
    return pipeline.generate(
        GenerateRequest(prompt="a photo of a cat", seed=3, num_inference_steps=3, **fields)
    ).frames


def denoiser_file(name: str, seed: int = 0) -> Path:
    return checkpoint(name, seed=seed) / TABLE[name].denoiser / WEIGHTS


def denoiser_of(pipeline: LoadedPipeline) -> Any:
    return getattr(pipeline.pipe, pipeline.spec.denoiser)


def require_same(found: Weights, wanted: Weights) -> None:
    assert found.keys() == wanted.keys()
    assert not [
        key
        for key, tensor in wanted.items()
        if not torch.equal(found[key], tensor.to(found[key].dtype))
    ]


def scaled(weights: Weights, spelling: str) -> tuple[Weights, Weights]:
    """The weights in float8 as published files have them, and what they stand for. Every other
    scale is one for each row.
    """
    packed: Weights = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    plain: Weights = {}
    for number, (key, tensor) in enumerate(weights.items()):
        stem = key.removesuffix(".weight")
        if tensor.ndim != 2 or stem == key:
            packed[key] = plain[key] = tensor
            continue
        scale = (
            tensor.abs().amax(dim=1, keepdim=True) if number % 2 else tensor.abs().amax()
        ) / 448 + 1e-6
        packed[key] = (tensor / scale).to(torch.float8_e4m3fn)
        packed[stem + spelling], packed[stem + ".input_scale"] = scale, torch.ones(())
        plain[key] = packed[key].float() * scale
    return packed, plain


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", NAMES)
def test_float8_weights_are_multiplied_by_their_scales(
    name: str, spelling: str, tmp_path: Path
) -> None:
    packed, plain = scaled(load_file(denoiser_file(name, seed=1)), spelling)
    save_file(packed, tmp_path / "x.safetensors")
    found = denoiser_of(loaded(name, denoiser=str(tmp_path / "x.safetensors"))).state_dict()
    require_same({key: found[key] for key in plain}, plain)


@pytest.mark.parametrize("name", ["sd1", "flux", "zimage"])
def test_float8_weights_with_scales_in_a_folder_are_read_or_refused(
    name: str, tmp_path: Path
) -> None:
    denoiser = TABLE[name].denoiser
    packed, plain = scaled(load_file(denoiser_file(name, seed=1)), ".scale_weight")
    folder = linked(checkpoint(name), tmp_path / "model")
    (folder / denoiser / WEIGHTS).unlink()
    save_file(packed, folder / denoiser / WEIGHTS)
    assert f"holds 8-bit weights with scales in its folder {denoiser}" in refusal(name, folder)
    for given in (folder / denoiser, folder / denoiser / WEIGHTS):
        found = denoiser_of(loaded(name, denoiser=str(given))).state_dict()
        require_same({key: found[key] for key in plain}, plain)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", ["sd1", "sdxl", "flux"])
def test_float8_weights_of_a_single_file_are_multiplied_by_their_scales(
    name: str, spelling: str, tmp_path: Path
) -> None:
    packed, plain = scaled(load_file(single_file(name, seed=1)), spelling)
    images = []
    for number, weights in enumerate((packed, plain)):
        folder = tmp_path / str(number)
        folder.mkdir()
        images.append(draw(loaded(name, beside(weights, folder, name))))
    assert np.abs(images[0].astype(int) - images[1]).max() <= 1
    assert np.abs(images[0].astype(int) - draw(loaded(name))).max() > 5


def beside(
    weights: Weights, folder: Path, name: str, metadata: dict[str, str] | None = None
) -> Path:
    """A single file with the configuration of its type beside it."""
    save_file(weights, folder / "model.safetensors", metadata=metadata)
    ignored = ("*.safetensors",) if TABLE[name].denoiser == "unet" else ()
    shutil.copytree(checkpoint(name), folder / "model", ignore=shutil.ignore_patterns(*ignored))
    return folder / "model.safetensors"


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (
            {"a.weight_scale_2": torch.ones(1)},
            "holds packed weights of an unsupported kind (a.weight_scale_2, 1 such tensors)",
        ),
        (
            {"nothing.scale_weight": torch.ones(1)},
            "has the scale nothing.scale_weight, but no nothing.weight",
        ),
    ],
)
def test_scales_of_another_kind_are_refused(more: Weights, what: str, tmp_path: Path) -> None:
    save_file(load_file(denoiser_file("sd1")) | more, tmp_path / "x.safetensors")
    assert what in refusal("sd1", denoiser=str(tmp_path / "x.safetensors"))


def test_scales_by_blocks_are_refused(tmp_path: Path) -> None:
    packed, _ = scaled(load_file(denoiser_file("sd1")), ".weight_scale")
    key = next(key for key in packed if key.endswith(".weight_scale"))
    save_file(packed | {key: torch.ones(3, 5)}, tmp_path / "x.safetensors")
    assert "by blocks ([3, 5]), which is not supported" in refusal(
        "sd1", denoiser=str(tmp_path / "x.safetensors")
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_before_the_names_makes_no_difference(name: str, tmp_path: Path) -> None:
    weights = load_file(denoiser_file(name, seed=1))
    save_file({PREFIX + key: tensor for key, tensor in weights.items()}, tmp_path / "x.safetensors")
    found = denoiser_of(loaded(name, denoiser=str(tmp_path / "x.safetensors"))).state_dict()
    require_same({key: found[key] for key in weights}, weights)


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("name", UNETS)
def test_a_unet_in_the_original_names_is_read_with_and_without_their_prefix(
    name: str, prefix: str, tmp_path: Path
) -> None:
    weights = load_file(denoiser_file(name, seed=1))
    save_file(
        {prefix + key: tensor for key, tensor in original_names(name, weights).items()},
        tmp_path / "x.safetensors",
    )
    require_same(
        denoiser_of(loaded(name, denoiser=str(tmp_path / "x.safetensors"))).state_dict(), weights
    )


def original_names(name: str, weights: Weights) -> Weights:
    """The upscaler has one more embedding."""
    named = {key: tensor for key, tensor in weights.items() if key != "class_embedding.weight"}
    more = {"label_emb.weight": weights["class_embedding.weight"]} if name == "sdup" else {}
    return {key: tensor.contiguous() for key, tensor in original_unet(named).items()} | more


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("name", UNETS)
def test_a_gguf_in_the_original_names_and_with_reshaped_layers_is_read(
    name: str, prefix: str, tmp_path: Path
) -> None:
    weights = load_file(denoiser_file(name, seed=1))
    wanted = write_gguf(
        tmp_path / "x.gguf",
        {prefix + key: tensor for key, tensor in original_names(name, weights).items()},
    )
    wanted_file = tmp_path / "x.safetensors"
    save_file(wanted, wanted_file)
    images = [
        draw_any(loaded(name, **{option: str(path)}))
        for option, path in (("gguf_model", tmp_path / "x.gguf"), ("denoiser", wanted_file))
    ]
    assert np.abs(images[0].astype(int) - images[1]).max() <= 1


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize(("name", "renamed"), [("zimage", original_zimage), ("ltx", original_ltx)])
def test_original_names_that_are_mostly_diffusers_own_are_converted(
    name: str, renamed: Callable[[Weights], Weights], prefix: str, tmp_path: Path
) -> None:
    weights = {key: tensor * 1.5 for key, tensor in load_file(denoiser_file(name)).items()}
    original = renamed(weights)
    stored = {prefix + key: tensor.contiguous() for key, tensor in original.items()}
    save_file(stored, tmp_path / "x.safetensors")
    found = denoiser_of(loaded(name, denoiser=str(tmp_path / "x.safetensors"))).state_dict()
    require_same({key: found[key] for key in weights}, weights)
    if prefix:
        return
    wanted = write_gguf(tmp_path / "x.gguf", stored)
    save_file(wanted, tmp_path / "y.safetensors")
    packed, plain = (
        denoiser_of(loaded(name, **{option: str(tmp_path / file)})).state_dict()
        for option, file in (("gguf_model", "x.gguf"), ("denoiser", "y.safetensors"))
    )
    for key, tensor in plain.items():
        torch.testing.assert_close(
            unpacked(packed[key], torch.float32), tensor, atol=5e-4, rtol=1e-3
        )


def draw_any(pipeline: LoadedPipeline) -> np.ndarray:
    from PIL import Image

    needs_image = "image" in pipeline.spec.requires
    return draw(pipeline, **({"image": Image.new("RGB", (16, 16), "red")} if needs_image else {}))


def write_gguf(path: Path, weights: Weights) -> Weights:
    """As city96's tool writes it: what does not divide into blocks is stored as rows of 256 beside
    its shape. What it stands for.
    """
    kind, stored = GGMLQuantizationType.Q8_0, {}
    writer = GGUFWriter(path, "sd1")
    for key, tensor in weights.items():
        array = tensor.float().numpy()
        if array.ndim > 1 and array.size % 256 == 0 and array.shape[-1] % 32:
            writer.add_array(f"comfy.gguf.orig_shape.{key}", [int(size) for size in array.shape])
            array = array.reshape(-1, 256)
        if array.ndim == 2 and array.shape[-1] % 32 == 0:
            packed = quantize(array, kind)
            writer.add_tensor(key, packed, raw_dtype=kind)
            array = dequantize(packed, kind)
        else:
            writer.add_tensor(key, array)
        stored[key] = torch.from_numpy(array.copy()).reshape(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


V_PREDICTION = {"prediction_type": "v_prediction"}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


@pytest.mark.parametrize(
    ("notes", "metadata", "wanted"),
    [
        (("v_pred",), None, V_PREDICTION),
        (("v_pred", "ztsnr"), None, ZERO_SNR),
        (("v_pred", "ztsnr"), {"modelspec.prediction_type": "epsilon"}, ZERO_SNR),
        ((), {"modelspec.prediction_type": "v"}, V_PREDICTION),
        ((), {"modelspec.prediction_type": "epsilon"}, {"prediction_type": "epsilon"}),
    ],
)
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_a_file_says_what_it_predicts(
    name: str, notes: tuple[str, ...], metadata: dict | None, wanted: dict, tmp_path: Path
) -> None:
    weights = load_file(single_file(name)) | {note: torch.zeros(0) for note in notes}
    pipeline = loaded(name, beside(weights, tmp_path, name, metadata))
    config = pipeline.pipe.scheduler.config
    assert {key: config[key] for key in wanted} == wanted
    want = draw(loaded(name, scheduler={"scheduler": "euler", **wanted}))
    assert np.abs(draw(pipeline, scheduler={"scheduler": "euler"}).astype(int) - want).max() <= 1


def test_a_replaced_unet_says_what_it_predicts_and_the_command_line_has_the_last_word(
    tmp_path: Path,
) -> None:
    save_file(
        load_file(denoiser_file("sdxl")) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)},
        tmp_path / "x.safetensors",
    )
    unet = str(tmp_path / "x.safetensors")
    pipeline, zero_snr = loaded("sdxl", denoiser=unet), loaded("sdxl", scheduler=ZERO_SNR)
    assert np.array_equal(draw(pipeline), draw(zero_snr))
    epsilon = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    overruled = loaded("sdxl", denoiser=unet, scheduler=epsilon)
    assert np.array_equal(draw(overruled), draw(loaded("sdxl")))


@pytest.mark.parametrize("name", EVERY_TYPE)
@pytest.mark.parametrize("component", ["denoiser", "vae"])
def test_a_checkpoint_with_missing_or_unknown_weights_is_refused(
    name: str, component: str, tmp_path: Path
) -> None:
    component = TABLE[name].denoiser if component == "denoiser" else component
    file = f"{component}/{WEIGHTS}"
    missing = max(load_file(checkpoint(name) / file))
    folder = without_a_weight(checkpoint(name), tmp_path / "model", file, unknown=("more.weight",))
    message = refusal(name, folder)
    assert (
        f"({component}) does not fit: 1 tensor is missing ({missing}); 1 tensor is unknown "
        "(more.weight)" in message
    )


@pytest.mark.parametrize(
    "name", ["sd1", "sdxl", "sd3", "flux", "hy", "pixa", "zimage", "wan_t2v", "svd"]
)
def test_an_encoder_with_missing_weights_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    linked(checkpoint(name), folder)
    for component in (part for part in folder.iterdir() if "encoder" in part.name):
        file = component / "model.safetensors"
        weights = load_file(file)
        missing = next(
            key
            for key in weights
            if ".layers.1." in key
            or ".block.1." in key
            or ".layer.1." in key
            or key.startswith("layers.1.")
        )
        file.unlink()
        save_file(
            {key: tensor for key, tensor in weights.items() if key != missing},
            file,
            metadata={"format": "pt"},
        )
        assert f"({component.name}) does not fit: 1 tensor is missing" in refusal(name, folder)
        save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", list(CONTROLNETS))
def test_a_controlnet_with_missing_or_unknown_weights_is_refused(name: str, tmp_path: Path) -> None:
    missing = max(load_file(controlnet(name) / WEIGHTS))
    folder = without_a_weight(controlnet(name), tmp_path / "net", WEIGHTS, unknown=("more",))
    message = refusal(name, control_net={str(folder): 1.0})
    assert f"1 tensor is missing ({missing}); 1 tensor is unknown (more)" in message


@pytest.mark.parametrize("name", ["sd1", "flux", "svd", "wan_t2v"])
def test_a_vae_with_nan_is_refused(name: str, tmp_path: Path) -> None:
    weights = load_file(checkpoint(name) / "vae" / WEIGHTS)
    key = next(key for key in weights if key.endswith("conv_in.weight"))
    weights[key].view(-1)[0] = float("nan")
    save_file(weights, tmp_path / "vae.safetensors")
    message = refusal(name, vae=str(tmp_path / "vae.safetensors"))
    assert (
        f"--vae={tmp_path / 'vae.safetensors'} holds weights that are not finite ({key})" in message
    )


@pytest.mark.parametrize("option", ["vae", "denoiser", "control_net", "ip_adapter"])
def test_a_pickle_of_another_kind_is_refused_by_its_name(option: str, tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save(load_file(lora("sd1")), file)
    scaled_options = option in ("control_net", "ip_adapter")
    assert f"{file} is a LoRA" in refusal(
        "sd1", **{option: {str(file): 1.0} if scaled_options else str(file)}
    )


def test_an_ip_adapter_in_a_pickle_is_compared_too(tmp_path: Path) -> None:
    shutil.copytree(ip_adapter("sdxl"), tmp_path / "ip")
    tensors = load_file(tmp_path / "ip" / IP_ADAPTER_FILE)
    parts: dict[str, Weights] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        parts[part][name] = tensor
    file = tmp_path / "ip" / "models" / "ip.bin"
    torch.save(parts, file)
    assert loaded("sdxl", ip_adapter={str(file): 1.0})
    assert "has cross_attention_dim=96, but the unet of --type=sd1" in refusal(
        "sd1", ip_adapter={str(file): 1.0}
    )


def test_a_motion_module_with_missing_weights_is_refused(tmp_path: Path) -> None:
    weights = load_file(motion_adapter() / WEIGHTS)
    missing = max(weights)
    save_file(
        {key: tensor for key, tensor in weights.items() if key != missing},
        tmp_path / "mm.safetensors",
    )
    options = {
        "motion_module": str(tmp_path / "mm.safetensors"),
        "motion_config": str(motion_adapter() / "config.json"),
    }
    assert f"1 tensor is missing ({missing})" in refusal("ad", checkpoint("sd1"), **options)

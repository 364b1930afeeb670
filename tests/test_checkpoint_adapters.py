"""Every adapter of the tiny checkpoints loads the way diffusers documents it, and changes the
result visibly.
"""

import tempfile

import diffusers
import numpy
import pytest
import torch

from tests.checkpoints import (
    IP_ADAPTER_FILE,
    IP_ADAPTER_IMAGE_ENCODER,
    checkpoint,
    controlnet,
    gguf,
    inputs,
    ip_adapter,
    load,
    lora,
    motion_adapter,
    motion_lora,
    sample_image,
    single_file,
)

pytestmark = (
    pytest.mark.slow
)  # what these show of test files alone the feature matrix shows of the product with them

VISIBLE = 0.1  # largest difference of a pixel in [0, 1]
ROUNDING = 1e-4
WITHOUT_LORA_LOADER = ("hy", "pixa", "pixs", "svd")


def slow(*values: object):
    """A case that runs the same code as its neighbours."""
    return pytest.param(*values, marks=pytest.mark.slow)


def image_of(pipe, name: str, **changes: object) -> numpy.ndarray:
    pipe.set_progress_bar_config(disable=True)
    result = pipe(**(inputs(name) | changes))
    return numpy.asarray(result.images if hasattr(result, "images") else result.frames)


def difference(one: numpy.ndarray, other: numpy.ndarray) -> float:
    return float(numpy.abs(one - other).max())


def denoiser_of(pipe) -> torch.nn.Module:
    return pipe.transformer if "transformer" in pipe.components else pipe.unet


@pytest.fixture(scope="module")
def plain():
    """name -> the image of the checkpoint without any adapter."""
    images: dict[str, numpy.ndarray] = {}

    def plain(name: str) -> numpy.ndarray:
        if name not in images:
            images[name] = image_of(load(name), name)
        return images[name]

    return plain


@pytest.mark.parametrize(
    ("name", "style"),
    [
        ("ad", "diffusers"),
        ("sd2", "diffusers"),
        ("sd3", "diffusers"),
        ("flux", "diffusers"),
        ("sd1", "kohya"),
        ("sdxl", "kohya"),
        ("flux", "kohya"),
        slow("ad", "kohya"),
        slow("sd1", "diffusers"),
        slow("sd2", "kohya"),
        slow("sdup", "diffusers"),
        slow("sdup", "kohya"),
        slow("sdxl", "diffusers"),
    ],
)
def test_lora_changes_the_image_by_its_scale(plain, name, style):
    pipe = load(name)
    pipe.load_lora_weights(lora(name, style=style), adapter_name="one")
    assert difference(image_of(pipe, name), plain(name)) > VISIBLE
    pipe.set_adapters("one", 0.0)
    assert difference(image_of(pipe, name), plain(name)) < ROUNDING


@pytest.mark.parametrize("name", WITHOUT_LORA_LOADER)
def test_lora_names_layers_of_a_denoiser_without_a_loader(name):
    from safetensors.torch import load_file

    modules = dict(denoiser_of(load(name)).named_modules())
    for key, tensor in load_file(lora(name)).items():
        layer, factor = key.split(".", 1)[1].removesuffix(".weight").rsplit(".", 1)
        linear = modules[layer]
        assert tensor.shape == (
            (4, linear.in_features) if factor == "lora_A" else (linear.out_features, 4)
        )


def test_loras_of_two_seeds_and_ranks_differ():
    assert (
        len({lora("sd1"), lora("sd1", seed=1), lora("sd1", rank=2), lora("sd1", style="kohya")})
        == 4
    )


def test_motion_lora_changes_the_video(plain):
    pipe = load("ad")
    pipe.load_lora_weights(motion_lora())
    assert difference(image_of(pipe, "ad"), plain("ad")) > VISIBLE


def test_motion_adapters_turn_sd1_into_different_videos():
    videos = []
    for seed in (0, 1):
        adapter = diffusers.MotionAdapter.from_pretrained(motion_adapter(seed=seed))
        pipe = diffusers.AnimateDiffPipeline.from_pretrained(
            checkpoint("sd1"), motion_adapter=adapter, local_files_only=True
        )
        videos.append(image_of(pipe, "ad"))
    assert videos[0].shape == (1, 4, 64, 64, 3)
    assert difference(*videos) > VISIBLE


@pytest.mark.parametrize(
    ("name", "pipeline", "model", "argument"),
    [
        ("sd1", "StableDiffusionControlNetPipeline", "ControlNetModel", "image"),
        slow("sd2", "StableDiffusionControlNetPipeline", "ControlNetModel", "image"),
        ("sdxl", "StableDiffusionXLControlNetPipeline", "ControlNetModel", "image"),
        ("sd3", "StableDiffusion3ControlNetPipeline", "SD3ControlNetModel", "control_image"),
        ("flux", "FluxControlNetPipeline", "FluxControlNetModel", "control_image"),
        ("hy", "HunyuanDiTControlNetPipeline", "HunyuanDiT2DControlNetModel", "control_image"),
    ],
)
def test_controlnet_follows_its_hint(name, pipeline, model, argument):
    net = getattr(diffusers, model).from_pretrained(controlnet(name))
    pipe = getattr(diffusers, pipeline).from_pretrained(
        checkpoint(name), controlnet=net, local_files_only=True
    )

    def image(hint_seed: int, scale: float) -> numpy.ndarray:
        return image_of(
            pipe,
            name,
            **{argument: sample_image(64, seed=hint_seed)},
            controlnet_conditioning_scale=scale,
        )

    assert difference(image(0, 1.0), image(0, 0.0)) > VISIBLE
    assert difference(image(0, 1.0), image(1, 1.0)) > VISIBLE


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux", slow("ad"), slow("sd2")])
def test_ip_adapter_follows_its_image_and_scale(plain, name):
    pipe = load(name)
    load_ip_adapter(pipe, name)
    images = {}
    for scale in (0.0, 1.0):
        pipe.set_ip_adapter_scale(scale)
        images[scale] = image_of(pipe, name, ip_adapter_image=sample_image(64))
    assert difference(images[0.0], plain(name)) < ROUNDING
    assert difference(images[1.0], plain(name)) > VISIBLE
    assert (
        difference(images[1.0], image_of(pipe, name, ip_adapter_image=sample_image(64, seed=1)))
        > VISIBLE
    )


def load_ip_adapter(pipe, name: str) -> None:
    """Each family of pipelines has arguments of its own."""
    folder = ip_adapter(name)
    file = {"weight_name": IP_ADAPTER_FILE.name, "subfolder": str(IP_ADAPTER_FILE.parent)}
    encoder = str(folder / IP_ADAPTER_IMAGE_ENCODER)
    if name == "flux":
        pipe.load_ip_adapter(
            str(folder),
            **file,
            image_encoder_pretrained_model_name_or_path=encoder,
            image_encoder_dtype=torch.float32,
        )
    elif name == "sd3":
        pipe.load_ip_adapter(str(folder), **file, image_encoder_folder=encoder)
    else:
        pipe.load_ip_adapter(
            str(folder), **file, image_encoder_folder=str(IP_ADAPTER_IMAGE_ENCODER)
        )


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [
        ("sd1", "StableDiffusionPipeline"),
        ("sd2", "StableDiffusionPipeline"),
        ("sdxl", "StableDiffusionXLPipeline"),
    ],
)
def test_single_file_holds_the_whole_pipeline(plain, name, pipeline):
    """The config folder has weights of another seed: none of them may be used."""
    folder = str(checkpoint(name))
    pipe = getattr(diffusers, pipeline).from_single_file(
        single_file(name, seed=1), config=folder, local_files_only=True
    )
    image = image_of(pipe, name)
    assert difference(image, image_of(load(name, seed=1), name)) < ROUNDING
    assert difference(image, plain(name)) > VISIBLE


def test_single_file_of_flux_holds_the_transformer(plain):
    pipe = load("flux")
    pipe.transformer = diffusers.FluxTransformer2DModel.from_single_file(
        single_file("flux"),
        config=str(checkpoint("flux")),
        subfolder="transformer",
        local_files_only=True,
    )
    assert difference(image_of(pipe, "flux"), plain("flux")) < ROUNDING


@pytest.mark.parametrize(
    ("name", "model"), [("flux", "FluxTransformer2DModel"), slow("sd1", "UNet2DConditionModel")]
)
def test_gguf_is_close_with_eight_bits_and_visibly_off_with_four(plain, name, model):
    differences = []
    for quantization in ("F32", "Q8_0", "Q4_0"):
        pipe = load(name)
        part = "transformer" if "transformer" in pipe.components else "unet"
        denoiser = getattr(diffusers, model).from_single_file(
            gguf(name, quantization),
            quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
            torch_dtype=torch.float32,
            config=str(checkpoint(name)),
            subfolder=part,
            local_files_only=True,
        )
        setattr(pipe, part, denoiser)
        differences.append(difference(image_of(pipe, name), plain(name)))
    exact, eight, four = differences
    assert exact < ROUNDING < eight < 0.02 < four


def check_second_rank_builds_everything(rank: int, world_size: int, folder: str) -> None:
    if rank == 1:
        tempfile.tempdir = folder
        assert len(list(checkpoint("sd1").rglob("model.safetensors"))) == 1
        assert len(list(ip_adapter("sd1").rglob("model.safetensors"))) == 1


def test_second_rank_builds_whole_checkpoints(run_on_ranks, tmp_path):
    run_on_ranks(check_second_rank_builds_everything, 2, str(tmp_path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: lora("sd1", style="peft"),
            "style='peft' is not a LoRA layout. Allowed: diffusers, kohya, dora.",
        ),
        (
            lambda: lora("hy", style="kohya"),
            "There is no kohya layout for type 'hy'. Allowed: ad, sd1, sd2, sdup, sdxl, flux.",
        ),
        (
            lambda: controlnet("svd"),
            "There is no ControlNet for type 'svd'. Allowed: sd1, sd2, sdxl, sd3, flux, hy, "
            "zimage, qwenimage.",
        ),
        (
            lambda: ip_adapter("hy"),
            "There is no IP-Adapter for type 'hy'. Allowed: ad, sd1, sd2, sdxl, sd3, flux, ",
        ),
        (
            lambda: gguf("hy"),
            "diffusers reads no GGUF file of type 'hy'. Allowed: sd1, sd2, sdup, sdxl, sd3, flux, ",
        ),
        (
            lambda: gguf("sd1", "Q4_K"),
            "quantization='Q4_K' cannot be written. Allowed: F32, F16, BF16, Q8_0, Q5_1, Q5_0, "
            "Q4_1, Q4_0.",
        ),
    ],
)
def test_rejects_what_does_not_exist(make, message):
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value).startswith(message)

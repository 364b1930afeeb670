"""Checkpoints made for inpainting, whose UNet reads the mask: under the row of their type, as
diffusers' inpainting pipelines run them.
"""

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file

from backends.errors import ConfigError, RequestError
from backends.generation import latents as latent_space
from backends.generation.pipeline import load_pipeline
from hosts.launch.settings import Settings
from hosts.launch.start_plan import plan_start
from tests.altered import WEIGHTS, linked
from tests.backends.features import CPU, TABLE, attached, half_mask, meshes, request_for, result
from tests.checkpoints import checkpoint, controlnet, motion_adapter, sample_image, single_file

SIDE = 64
NAMES = ["sd1", "sdxl", pytest.param("sd2", marks=pytest.mark.slow)]
INPAINTING = {
    "sd1": "StableDiffusionInpaintPipeline",
    "sd2": "StableDiffusionInpaintPipeline",
    "sdxl": "StableDiffusionXLInpaintPipeline",
}
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
NUM_MASK_CHANNELS = 5


def widened(weight):
    """A first convolution with input channels for the mask and the masked image, too."""
    out, _, *kernel = weight.shape
    more = torch.randn(out, NUM_MASK_CHANNELS, *kernel, generator=torch.Generator().manual_seed(9))
    return torch.cat([weight, more * weight.std()], dim=1)


def inpainting_folder(name, folder):
    """The tiny checkpoint with a wider first convolution, as its inpainting class saves it."""
    folder = linked(checkpoint(name), folder)
    for file, change in (
        ("model_index.json", {"_class_name": INPAINTING[name]}),
        ("unet/config.json", {"in_channels": 4 + NUM_MASK_CHANNELS}),
    ):
        content = json.loads((folder / file).read_text()) | change
        (folder / file).unlink()
        (folder / file).write_text(json.dumps(content))
    weights = load_file(folder / "unet" / WEIGHTS)
    (folder / "unet" / WEIGHTS).unlink()
    weights["conv_in.weight"] = widened(weights["conv_in.weight"])
    save_file(weights, folder / "unet" / WEIGHTS, metadata={"format": "pt"})
    return folder


def inpainting_file(name, folder):
    """The same as one file in the original names, beside the configuration of an ordinary one."""
    tensors = load_file(single_file(name))
    tensors[FIRST] = widened(tensors[FIRST])
    folder.mkdir()
    linked(checkpoint(name), folder / "x")
    for weights in (folder / "x").rglob("*.safetensors"):
        weights.unlink()
    save_file(tensors, folder / "x.safetensors")
    return folder / "x.safetensors"


def start(path, name=None, **options):
    values = {"type": name, "checkpoint": str(path), "variant": "fp32", **options}
    return plan_start(Settings.from_values(values), TABLE, num_gpus=0, num_ranks=1)


def opened(path, name=None):
    found = start(path, name)
    return load_pipeline(found.spec, found.load, device=CPU)


def fields(spec, **others):
    small = {"height": SIDE, "width": SIDE, "num_inference_steps": 5, "warmup_steps": None}
    images = {"init_image": sample_image(SIDE), "mask_image": half_mask(SIDE, SIDE)}
    return request_for(spec, **{**small, **images, "scheduler": "ddim", **others})


@pytest.mark.parametrize("name", NAMES)
def test_folder_generates_what_diffusers_inpainting_pipeline_does(name, tmp_path, monkeypatch):
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()
    )  # ours takes the middle too
    folder = inpainting_folder(name, tmp_path / "model")
    pipe = opened(folder)
    assert pipe.spec.name == name and pipe.spec.reads_mask
    theirs = getattr(diffusers, INPAINTING[name]).from_pretrained(folder, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    for strength in (0.6, 1.0):
        asked = fields(pipe.spec, strength=strength, guidance_scale=3.0)
        ours = pipe.generate(asked)
        theirs.scheduler = type(pipe.pipe.scheduler).from_config(pipe.pipe.scheduler.config)
        made = theirs(
            asked.prompt, image=sample_image(SIDE), mask_image=half_mask(SIDE, SIDE),
            strength=strength, height=SIDE, width=SIDE, num_inference_steps=5, guidance_scale=3.0,
            generator=torch.Generator().manual_seed(asked.seed), output_type="latent",
        ).images  # fmt: skip
        wanted = latent_space.to_client_space(
            made, pipe=pipe.pipe, spec=pipe.spec, height=SIDE, width=SIDE
        )
        np.testing.assert_allclose(
            ours.latents, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max(), err_msg=f"{strength}"
        )


@pytest.mark.parametrize("name", NAMES)
def test_single_file_beside_an_ordinary_configuration_equals_the_folder(name, tmp_path):
    folder, file = (
        inpainting_folder(name, tmp_path / "model"),
        inpainting_file(name, tmp_path / "f"),
    )
    for type_name in (None, name):
        assert start(file, type_name).spec.requires == ("prompt", "init_image", "mask_image")
    one, other = opened(folder), opened(file, name)
    asked = fields(one.spec)
    want = result(one, asked)
    assert torch.allclose(result(other, asked), want, atol=1e-5 * float(want.abs().max()))


def test_request_without_image_or_mask_is_refused_by_name(tmp_path):
    pipe = opened(inpainting_folder("sd1", tmp_path / "model"))
    for field in ("init_image", "mask_image"):
        with pytest.raises(RequestError, match=f"{field} is missing.*made for inpainting") as error:
            pipe.check(fields(pipe.spec, **{field: None}))
        assert error.value.field == field


def test_controlnet_and_motion_modules_are_refused(tmp_path):
    folder = inpainting_folder("sd1", tmp_path / "model")
    with pytest.raises(ConfigError, match=r"has in_channels=4, but the unet .* has 9"):
        start(folder, "sd1", control_net=str(controlnet("sd1")))
    file = inpainting_file("sd1", tmp_path / "f")
    with pytest.raises(ConfigError, match=r"--control_net=.*9 input channels"):
        start(file, "sd1", control_net=str(controlnet("sd1")))
    with pytest.raises(ConfigError, match=r"9 input channels.*made for inpainting"):
        start(folder, "ad", motion_adapter=str(motion_adapter()))


def compare(rank, world_size, name, path, backends):
    spec = start(path).spec
    pipe = opened(path)
    asked = request_for(
        spec, init_image=sample_image(48), mask_image=half_mask(), strength=0.8,
        num_inference_steps=3, warmup_steps=3,
    )  # fmt: skip
    want = result(pipe, asked)
    for backend, mesh in meshes(spec, backends, rank, world_size).items():
        with attached(pipe, mesh):
            got = result(pipe, asked)
        assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max())), backend


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_equal_one(run_on_ranks, name, tmp_path):
    backends = [name for name in TABLE[name].backends if name != "single"]
    path = inpainting_folder(name, tmp_path / "model")
    run_on_ranks(compare, 2, name, str(path), backends)

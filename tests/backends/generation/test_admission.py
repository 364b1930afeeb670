"""What is refused before any rank sees it, without torch."""

import subprocess
import sys
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
from PIL import Image

from backends.errors import RequestError, UnsupportedError
from backends.generation.admission import AtLaunch, require_possible
from backends.model_table import read_table
from backends.request import GenerateRequest

TABLE = read_table()
IMAGE = Image.new("RGB", (64, 64))
EULER = {"_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 1000}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
EMBEDS = np.zeros((1, 4, 8), np.float32)
POOLED = np.zeros((1, 8), np.float32)
LATENTS = np.zeros((1, 4, 8, 8), np.float32)


def spec_of(name, **facts):
    own = FLOW if TABLE[name].flow_matching else EULER
    return replace(TABLE[name], sampler=MappingProxyType(own), **facts)


def check(name, fields, launch=None, names=None, **facts):
    request = GenerateRequest(**fields)
    require_possible(request, spec_of(name, **facts), launch or AtLaunch(), names or {})


A = {"prompt": "a"}
SPACED = {"scheduler": {"scheduler": "euler", "timestep_spacing": "trailing"}}
REFUSED = {
    "no prompt": ("sdxl", {}, "no prompt was given", "prompt"),
    "no prompt of a row that runs as it is": ("sana", {}, "prompt is missing", "prompt"),
    "no image": ("wan_i2v", A, "image is missing", "image"),
    "no image to enlarge": ("sdup", A, "image is missing", "image"),
    "no image of svd": ("svd", {}, "image is missing", "image"),
    "no mask": ("flux_fill", {**A, "image": IMAGE}, "mask_image is missing", "mask_image"),
    "a mask alone": ("sdxl", {**A, "mask_image": IMAGE}, "without init_image", "mask_image"),
    "two starts": (
        "sdxl", {**A, "init_image": IMAGE, "latents": LATENTS}, "both latents and init_image",
        "init_image",
    ),
    "two images": (
        "qwenimage_edit", {**A, "image": IMAGE, "init_image": IMAGE}, "takes one image",
        "init_image",
    ),
    "prompt and embeddings": (
        "sdxl", {**A, "prompt_embeds": EMBEDS}, "both prompt and prompt_embeds", "prompt_embeds",
    ),
    "embeddings without pooled ones": (
        "sdxl", {"prompt_embeds": EMBEDS}, "no pooled_output", "prompt_embeds",
    ),
    "embeddings of two prompts": (
        "sd1", {"prompt_embeds": np.zeros((2, 4, 8), np.float32)}, "of shape", "prompt_embeds",
    ),
    "flat embeddings": (
        "sdxl",
        {"prompt_embeds": np.zeros((4, 8), np.float32), "pooled_prompt_embeds": POOLED},
        "of shape", "prompt_embeds",
    ),
    "sigmas that rise": ("sdxl", {**A, "sigmas": [0.0, 1.0, 3.0]}, "must decrease", "sigmas"),
    "timesteps that rise": ("sdxl", {**A, "timesteps": [1, 500]}, "must decrease", "timesteps"),
    "timesteps twice": ("sdxl", {**A, "timesteps": [500, 500]}, "must decrease", "timesteps"),
    "no timesteps": ("sdxl", {**A, "timesteps": []}, "is empty", "timesteps"),
    "one sigma": ("sdxl", {**A, "sigmas": [1.0]}, "has 1 values", "sigmas"),
    "both lists": (
        "sdxl", {**A, "sigmas": [1.0, 0.0], "timesteps": [9]}, "exclude each other", "timesteps",
    ),
    "timesteps too high": ("sdxl", {**A, "timesteps": [1000, 5]}, "at most 999", "timesteps"),
    "sigmas too high": ("sd3", {**A, "sigmas": [1.5, 0.0]}, "at most 1", "sigmas"),
    "a sampler without sigmas": (
        "sdxl", {**A, "scheduler": "ddim", "sigmas": [3.0, 0.0]}, "ddim does not accept", "sigmas",
    ),
    "a flow sampler without timesteps": (
        "sd3", {**A, "scheduler": "unipc", "timesteps": [900]}, "unipc does not accept",
        "timesteps",
    ),
    "a start after the end": (
        "sdxl", {**A, "latents": LATENTS, "first_step": 30}, "first_step=30", "first_step",
    ),
    "nothing to do": (
        "sdxl", {**A, "latents": LATENTS, "first_step": 4, "stop_step": 4}, "no step is left",
        "stop_step",
    ),
    "a strength that begins after the end": (
        "sdxl", {**A, "init_image": IMAGE, "strength": 0.2, "stop_step": 20},
        "no step is left of 30 steps with strength=0.2, stop_step=20", "stop_step",
    ),
    "an end before the first step": (
        "sdxl", {**A, "denoising_end": 1e-4}, "no step is left of 30 .*denoising_end=0.0001",
        "denoising_end",
    ),
    "an end before the first step of a list": (
        "sdxl", {**A, "timesteps": [900, 500], "denoising_end": 0.05}, "no step is left of 2",
        "denoising_end",
    ),
    "an end before the start": (
        "sdxl",
        {**A, **SPACED, "init_image": IMAGE, "strength": 0.3, "denoising_end": 0.3},
        "no step is left of 30 steps with strength=0.3, denoising_end=0.3", "denoising_end",
    ),
    "an end before the first step of a video": (
        "wan_t2v", {**A, "denoising_end": 0}, "no step is left", "denoising_end",
    ),
    "a tiny start": (
        "flux", {**A, "init_image": Image.new("RGB", (1, 1))}, "too small", "init_image",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "said", "field"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_done_is_refused_by_its_name(name, fields, said, field):
    with pytest.raises(RequestError, match=said) as refused:
        check(name, fields)
    assert refused.value.field == field
    with pytest.raises(RequestError) as renamed:
        check(name, fields, names={field: "theirs"})
    assert renamed.value.field == "theirs"


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("sdxl", {**A, "sigmas": [3.0, 1.0, 0.0]}),
        ("sdxl", {**A, "scheduler": "dpmpp_2m", "timesteps": [999, 5]}),
        ("sd3", {**A, "sigmas": [1.0, 0.5, 0.0]}),
        ("sd3", {**A, "timesteps": [1000, 500]}),
        ("sd3", {**A, "scheduler": "unipc", "sigmas": [1.0, 0.5]}),
        ("sdxl", {**A, "init_image": IMAGE, "strength": 0.0}),
        ("sdxl", {**A, "init_image": IMAGE, "mask_image": IMAGE}),
        ("sdxl", {**A, "latents": LATENTS, "first_step": 29}),
        ("sdxl", {**A, "latents": LATENTS, "first_step": 5, "num_inference_steps": 6}),
        ("svd", {"image": IMAGE}),
        ("sdxl", {"prompt_embeds": EMBEDS, "pooled_prompt_embeds": POOLED}),
        ("flux2_klein", {**A, "image": [IMAGE, IMAGE]}),
    ],
)
def test_what_can_be_done_passes(name, fields):
    check(name, fields)


def test_embeddings_that_need_a_mask_are_not_available():
    for name in ("hy", "pixa", "qwenimage", "lumina2"):
        with pytest.raises(UnsupportedError, match="embeddings cannot be given"):
            check(name, {"prompt_embeds": EMBEDS})


def test_adapters_need_their_images():
    two = AtLaunch(control_nets=2)
    for fields, said in (
        ({}, "control_image is missing"),
        ({"control_image": [IMAGE] * 3}, "3 control images were sent for 2"),
        ({"control_image": IMAGE, "controlnet_conditioning_scale": [1, 1, 1]}, "3 scales"),
        ({"control_image": IMAGE, "control_guidance_start": 1.0}, "is not before"),
    ):
        with pytest.raises(RequestError, match=said):
            check("sdxl", {**A, **fields}, two)
    check("sdxl", {**A, "control_image": IMAGE}, two)
    early = {"control_image": IMAGE, "control_guidance_end": 0.5}
    with pytest.raises(UnsupportedError, match="at every step"):
        check("hy", {**A, **early}, AtLaunch(control_nets=1))
    with pytest.raises(RequestError, match="ip_adapter_image is missing"):
        check("sdxl", A, AtLaunch(ip_adapters=1))
    with pytest.raises(UnsupportedError, match="too many"):
        check("sd3", {**A, "ip_adapter_image": [IMAGE, IMAGE]}, AtLaunch(ip_adapters=1))


def test_compel_reads_no_skipped_layers():
    compel = AtLaunch(compel=True)
    with pytest.raises(UnsupportedError, match="clip_skip=1 is not available"):
        check("sdxl", {**A, "clip_skip": 1}, compel)
    check("sdxl", {**A, "clip_skip": 1, "compel": False}, compel)
    check("sdxl", {**A, "clip_skip": 1})


@pytest.mark.parametrize(
    ("extent", "fields", "said"),
    [
        ({"height": (1, 96)}, {"height": 112}, "height=112 is not allowed.*1 to 96"),
        ({"width": (1, 96)}, {"width": 112}, "width=112"),
        ({"width": (96, 96)}, {"width": 64}, "96 only"),
        ({"width": (1, 32)}, {"init_image": IMAGE}, "init_image: width=64"),
        ({"width": (1, 96)}, {}, "width=1024"),
        ({"clip_skip": (0, 3)}, {"clip_skip": 4}, "clip_skip=4 .* 0 to 3"),
    ],
)
def test_values_beyond_what_the_checkpoint_can_do_are_refused(extent, fields, said):
    with pytest.raises(RequestError, match=said):
        check("sd3", {**A, **fields}, extent=extent)


WIDE = {"prompt_embeds": EMBEDS, "pooled_prompt_embeds": POOLED}
SHAPES = {
    "channels": ("sdxl", {**A, "latents": LATENTS}, {"latent_channels": 16}, "latents"),
    "no latents at all": (
        "sdxl", {**A, "latents": LATENTS[0]}, {"latent_channels": 4}, "latents",
    ),
    "latents of half a token": (
        "flux", {**A, "latents": np.zeros((1, 4, 7, 8), np.float32)}, {}, "latents",
    ),
    "latents beyond the positions": (
        "sd3", {**A, "latents": LATENTS}, {"extent": {"width": (1, 48)}}, "latents",
    ),
    "embeddings": ("sdxl", WIDE, {"embeds_widths": (7, 8)}, "prompt_embeds"),
    "pooled embeddings": ("sdxl", WIDE, {"embeds_widths": (8, 7)}, "prompt_embeds"),
    "a small reference": (
        "flux2", {**A, "image": [IMAGE, Image.new("RGB", (64, 63))]}, {}, "image",
    ),
    "a long reference": ("flux2_klein", {**A, "image": Image.new("RGB", (64, 513))}, {}, "image"),
    "no end": ("sdxl", {**A, "denoising_end": 0.0}, {}, "denoising_end"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "facts", "field"), SHAPES.values(), ids=SHAPES)
def test_what_the_checkpoint_cannot_take_is_refused_by_its_name(name, fields, facts, field):
    for names in ({}, {field: "theirs"}):
        with pytest.raises(RequestError, match=r"Send|Allowed") as refused:
            check(name, fields, names=names, **facts)
        assert refused.value.field == names.get(field, field)


def test_what_the_checkpoint_can_take_passes():
    check("sdxl", {**A, "latents": LATENTS}, latent_channels=4)
    check("sdxl", WIDE, embeds_widths=(8, 8))
    check("sdxl", WIDE, embeds_widths=(None, None))
    check("flux2", {**A, "image": Image.new("RGB", (512, 64))})


def test_loras_that_are_fixed_cannot_be_chosen(tmp_path):
    fixed = AtLaunch(loras=("/a",), fixed_loras="compiles its denoiser")
    for asked in ({}, {"/a": 1.0}):
        with pytest.raises(UnsupportedError, match="a host that compiles its denoiser"):
            check("sdxl", {**A, "lora": asked}, fixed)
    check("sdxl", A, fixed)
    check("sdxl", {**A, "lora": {}}, replace(fixed, loras=()))  # asks for none, and there is none


def test_needs_no_torch():
    code = "import backends.generation.admission, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

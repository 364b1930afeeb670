"""LoRA files that were trained for another model are found out by their headers alone."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from backends.errors import ConfigError, RequestError
from backends.files.adapter_fit import (
    FAMILIES,
    foreign_architecture,
    foreign_loras,
    require_fit,
)
from backends.generation.admission import AtLaunch, require_possible
from backends.model_table import read_table
from backends.request import GenerateRequest, LoadRequest
from tests.checkpoints import NAMES, checkpoint, lora
from tests.checkpoints.lora import KOHYA_NAMES

TABLE = read_table()
WITH_LORA = [
    name
    for name in NAMES
    if TABLE[name].supports("single", "lora").status != "unsupported" and not TABLE[name].takes
]


def load_with(name, path):
    return LoadRequest(
        model_type=name, checkpoint=str(checkpoint(name)), variant="fp32", lora={str(path): 1.0}
    )


def test_every_type_that_takes_loras_has_a_family_but_those_nobody_names():
    known = {name for types in FAMILIES.values() for name in types}
    assert known <= set(TABLE)
    others = {
        name
        for name, spec in TABLE.items()
        if spec.supports("single", "lora").status != "unsupported"
    } - known
    assert others == UNNAMED


UNNAMED = {
    "ovis", "bria", "longcat", "ernie", "krea2", "kandinsky5", "helios",
}  # fmt: skip
"""No trainer has a name for them in a LoRA's metadata."""


@pytest.mark.parametrize("name", WITH_LORA)
def test_a_lora_of_the_model_itself_fits(name):
    for style in ("diffusers", "kohya") if name in KOHYA_NAMES else ("diffusers",):
        require_fit(TABLE[name], load_with(name, lora(name, style=style)))


def wider(path, pattern, folder, metadata=None):
    """A copy of a LoRA whose layers of this name read twice as many channels."""
    keys = {
        key: torch.cat([tensor, tensor], dim=1)
        if re.search(pattern, key) and tensor.dim() > 1
        else tensor
        for key, tensor in load_file(path).items()
    }
    save_file(keys, folder / "wide.safetensors", metadata=metadata)
    return folder / "wide.safetensors"


@pytest.mark.parametrize(
    ("name", "style", "pattern", "message"),
    [
        ("sd1", "diffusers", r"attn2.to_k.lora_A", "unet whose texts have a width of 64.*is 32"),
        ("sd2", "kohya", r"attn2_to_k.lora_down", "unet whose texts .* width of"),
        ("wan_t2v", "diffusers", r"attn1.to_q.lora_A", "transformer whose hidden states have a wi"),
        ("flux", "kohya", r"img_attn_qkv.lora_down", "transformer whose hidden states have a wid"),
        ("qwenimage", "diffusers", r"attn.to_q.lora_A", "transformer whose hidden states have a"),
    ],
)
def test_a_lora_of_a_model_of_another_width_is_refused_before_loading(
    name, style, pattern, message, tmp_path
):
    path = wider(lora(name, style=style), pattern, tmp_path)
    with pytest.raises(ConfigError, match=message) as refused:
        require_fit(TABLE[name], load_with(name, path))
    assert f"--lora={path}" in str(refused.value)
    assert str(refused.value).endswith(f"for this size of {TABLE[name].title}.")


@pytest.mark.parametrize(
    ("metadata", "fits", "others"),
    [
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "sd1 ad", "sd2 sdxl flux"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "sd2", "sd1 sd3"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "sdxl", "sd1 sd2 kolors"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl", "sd1"),
        ({"ss_base_model_version": "sd_v1"}, "sd1", "sd2"),
        ({"ss_base_model_version": "sd_1.5"}, "sd1", "sdxl"),
        ({"ss_base_model_version": "sd3.5_large"}, "sd3", "sdxl flux"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "flux flux_kontext", "chroma flux2"),
        ({"ss_base_model_version": "flux1"}, "flux", "chroma"),
        ({"modelspec.architecture": "flux-2-dev/lora"}, "flux2", "flux"),
        ({"modelspec.architecture": "chroma/lora"}, "chroma", "flux"),
        ({"modelspec.architecture": "wan2.1-t2v-14B/lora"}, "wan_t2v wan22_t2v", "hunyuanvideo"),
        ({"modelspec.architecture": "hunyuan-video/lora"}, "hunyuanvideo", "wan_t2v"),
        ({"modelspec.architecture": "qwen-image-edit/lora"}, "qwenimage qwenimage_edit", "zimage"),
        ({"ss_base_model_version": "zimage"}, "zimage", "qwenimage"),
        ({"modelspec.architecture": "something new"}, "sd1 flux sdxl", ""),
        ({}, "sd1 flux", ""),
    ],
)
def test_what_a_lora_says_that_it_was_trained_on_is_compared(metadata, fits, others):
    for name in fits.split():
        assert not foreign_architecture(metadata, TABLE[name]), name
    for name in others.split():
        ((key, value),) = metadata.items()
        assert foreign_architecture(metadata, TABLE[name]) == f"{key} {value!r}"


def test_a_lora_that_names_another_model_is_told_at_launch(tmp_path):
    header = {"modelspec.architecture": "flux-1-dev/lora"}
    path = wider(lora("sdxl"), "nothing", tmp_path, header)
    (told,) = foreign_loras(load_with("sdxl", path), TABLE["sdxl"])
    assert told.startswith(f"--lora={path} says that it was trained on another model (modelspec")
    assert not list(foreign_loras(load_with("sdxl", lora("sdxl")), TABLE["sdxl"]))


def test_a_lora_that_names_another_model_is_refused_in_a_request(tmp_path):
    header = {"modelspec.architecture": "flux-1-dev/lora"}
    path = str(wider(lora("sdxl"), "nothing", tmp_path, header))
    asked = GenerateRequest(prompt="a", lora={path: 1.0})
    with pytest.raises(RequestError, match=r"was trained on another model .*flux-1-dev") as refused:
        require_possible(asked, TABLE["sdxl"], AtLaunch())
    assert refused.value.field == "lora"
    require_possible(asked, TABLE["sdxl"], AtLaunch(loras=(path,)))  # told when it was given
    own = GenerateRequest(prompt="a", lora={str(lora("sdxl")): 1.0})
    require_possible(own, TABLE["sdxl"], AtLaunch())
    whole = checkpoint("sdxl") / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(RequestError, match=r"^lora=.* a VAE"):
        require_possible(
            GenerateRequest(prompt="a", lora={str(whole): 1.0}), TABLE["sdxl"], AtLaunch()
        )

"""Denoisers and VAEs of another type are refused before anything starts, as a part
of a launch and as its one file.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from backends.errors import ConfigError
from backends.files.generic import generic_spec
from backends.step_cache_spec import parse_step_cache
from hosts.launch.files import denoiser_files
from hosts.launch.settings import Settings
from tests.checkpoints import (
    checkpoint,
    gguf,
    lora,
    single_file,
)
from tests.checkpoints.single_file import GGUF_NAMES
from tests.every_type import EVERY_TYPE
from tests.hosts.launch.fit_planning import TABLE, beside, plan, refusal, shares_a_unet, weights


@pytest.mark.parametrize("name", EVERY_TYPE)
def test_a_vae_of_another_type_is_refused_as_a_folder_and_as_a_file(name: str) -> None:
    own = json.loads((checkpoint(name) / "vae" / "config.json").read_text())
    for other in ("sd1", "flux", "svd", "qwenimage", "wan_t2v", "flux2"):
        folder = checkpoint(other) / "vae"
        config = json.loads((folder / "config.json").read_text())
        if config["_class_name"] != own["_class_name"]:
            assert (
                f"has a VAE of class {config['_class_name']}, but --type={name} needs"
                in refusal(name, vae=str(folder))
            )
        elif config.get("latent_channels") != own.get("latent_channels"):
            assert f"has {config['latent_channels']} latent channels" in refusal(
                name, vae=str(folder)
            )
            message = refusal(name, vae=str(folder / "diffusion_pytorch_model.safetensors"))
            assert (
                f"has {config['latent_channels']} latent channels" in message
                and "--vae_config=CONFIG.JSON" in message
            )


@pytest.mark.parametrize("name", ["sd1", "sdxl", "flux", "wan_t2v"])
def test_what_is_no_whole_vae_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    tiny = {"encoder.layers.0.weight": (8, 3, 3, 3), "decoder.layers.0.weight": (8, 4, 3, 3)}
    original = {"1.weight": (8, 4, 3, 3), "3.conv.0.weight": (8, 8, 3, 3)}
    for number, tensors in enumerate((tiny, original)):
        message = refusal(name, vae=weights(tmp_path / f"{number}.safetensors", tensors))
        assert (
            "is a tiny VAE (TAESD)" in message
            and f"Give a VAE ({TABLE[name].fits['vae']}) made for" in message
        )
    (tmp_path / "taesd").mkdir()
    (tmp_path / "taesd" / "config.json").write_text(
        '{"_class_name": "AutoencoderTiny", "latent_channels": 4}'
    )
    shutil.copy(
        tmp_path / "0.safetensors", tmp_path / "taesd" / "diffusion_pytorch_model.safetensors"
    )
    assert "has a VAE of class AutoencoderTiny" in refusal(name, vae=str(tmp_path / "taesd"))
    whole = load_file(checkpoint(name) / "vae" / "diffusion_pytorch_model.safetensors")
    for half, other in (("encoder", "decoder"), ("decoder", "encoder")):
        save_file(
            {key: value for key, value in whole.items() if half in key},
            tmp_path / "half.safetensors",
        )
        message = refusal(name, vae=str(tmp_path / "half.safetensors"))
        assert f"is a VAE with no {other}, only its {half}" in message
    assert (
        "is a LoRA"
        in (message := refusal(name, vae=str(lora(name if name != "wan_t2v" else "flux"))))
        and "--lora" in message
    )


ALIKE = (
    {"pixa", "pixs"},
    {"flux", "flux_kontext"},
    {"wan_t2v", "skyreels"},
    {"wan_t2v", "wan22_t2v"},
    {"flux2", "flux2_klein"},
    {"qwenimage", "qwenimage_edit"},
    {"qwenimage", "qwenimage_edit_plus"},
)
"""Types whose denoisers differ in nothing but their training; FLUX.2's also in sizes, which follow
its text encoder, and here both have the same.
"""


@pytest.mark.parametrize("name", GGUF_NAMES)
def test_a_gguf_of_another_type_is_refused_with_its_own(name: str) -> None:
    for other in GGUF_NAMES:
        if other == name:
            assert plan(name, gguf_model=str(gguf(other))).load.gguf_model
        elif not shares_a_unet(name, other) and {name, other} not in ALIKE:
            message = refusal(name, gguf_model=str(gguf(other)))
            assert "--gguf_model=" in message and f"--type={other}" in message


@pytest.mark.parametrize("name", EVERY_TYPE)
def test_a_denoiser_of_another_type_is_refused_with_its_own(name: str) -> None:
    denoiser = TABLE[name].denoiser
    for other in (
        "sd1",
        "sdxl",
        "sdup",
        "svd",
        "sd3",
        "flux",
        "hy",
        "zimage",
        "qwenimage",
        "flux2",
        "wan_t2v",
        "pixs",
    ):
        folder = checkpoint(other) / TABLE[other].denoiser
        if other == name or shares_a_unet(name, other) or {name, other} in ALIKE:
            continue
        for given in (folder, folder / "diffusion_pytorch_model.safetensors"):
            message = refusal(name, **{denoiser: str(given)})
            assert f"--{denoiser}={given} " in message
    assert "is a VAE" in (
        message := refusal(
            name,
            **{denoiser: str(checkpoint("sd1") / "vae" / "diffusion_pytorch_model.safetensors")},
        )
    )
    assert "Give it with --vae" in message


@pytest.mark.parametrize("name", EVERY_TYPE)
def test_a_denoiser_with_missing_or_unknown_weights_is_counted(name: str, tmp_path: Path) -> None:
    denoiser = TABLE[name].denoiser
    tensors = load_file(checkpoint(name) / denoiser / "diffusion_pytorch_model.safetensors")
    *rest, first = sorted(tensors)
    save_file(
        {key: tensors[key] for key in rest} | {"more": torch.zeros(1)}, tmp_path / "x.safetensors"
    )
    message = refusal(name, **{denoiser: str(tmp_path / "x.safetensors")})
    assert f"1 tensor is missing ({first})" in message and "1 tensor is unknown (more)" in message


@pytest.mark.parametrize(
    ("title", "tensors"),
    [
        ("a text encoder or language model", {"token_embd.weight": (8, 8)}),
        (
            "a text encoder or language model",
            {"encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)},
        ),
        (
            "a denoiser of AuraFlow: no type runs this family",
            {"double_layers.0.attn.w2q.weight": (8,)},
        ),
        (
            "a denoiser of FLUX.1: it is made for depth or edges",
            {"double_blocks.0.img_attn.norm.key_norm.scale": (8,), "img_in.weight": (8, 128)},
        ),
    ],
)
def test_a_file_of_a_family_that_no_type_runs_says_so(
    title: str, tensors: dict, tmp_path: Path
) -> None:
    file = weights(tmp_path / "x.safetensors", tensors)
    assert f"--transformer={file} is {title}" in refusal("flux", transformer=file)


def test_kontext_and_flux_are_told_apart_by_their_classes() -> None:
    assert "--type=flux needs a FluxPipeline. Give --type=flux_kontext." in refusal(
        "flux", checkpoint("flux_kontext")
    )
    assert "Give --type=flux." in refusal("flux_kontext", checkpoint("flux"))


def test_kontext_is_told_by_its_metadata(tmp_path: Path) -> None:
    tensors = {"double_blocks.0.img_attn.norm.key_norm.scale": (8,), "img_in.weight": (8, 64)}
    file = weights(tmp_path / "x.safetensors", tensors, {"modelspec.title": "FLUX.1 Kontext [dev]"})
    assert "is a denoiser of FLUX.1 (kontext): it edits a reference image" in refusal(
        "flux", transformer=file
    )


SINGLE = [name for name, spec in TABLE.items() if spec.single_file]


@pytest.mark.parametrize("name", SINGLE)
def test_a_single_file_runs_as_its_own_type_and_as_no_other(name: str, tmp_path: Path) -> None:
    file = beside(single_file(name), tmp_path, name)
    assert plan(None, file).spec.name == name
    for other in SINGLE:
        if other == name or shares_a_unet(name, other):
            assert plan(other, file).spec.name == other
        else:
            assert f"Give --type={name}" in refusal(other, file)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_single_file_without_denoiser_or_text_encoders_says_so(name: str, tmp_path: Path) -> None:
    tensors = load_file(single_file(name))
    parts = {
        "denoiser": "model.diffusion_model.",
        "text encoders": ("cond_stage_model.", "conditioner."),
    }
    for number, (what, prefix) in enumerate(parts.items()):
        (tmp_path / what).mkdir()
        file = beside(single_file(name), tmp_path / what, name)
        file.unlink()
        save_file(
            {key: value for key, value in tensors.items() if not key.startswith(prefix)}, file
        )
        message = refusal(name, file)
        assert ("and no denoiser" if number == 0 else "holds no text_encoder, and") in message


@pytest.mark.parametrize("channels", [8, 5])
def test_a_single_file_for_editing_or_depth_is_refused_with_the_reason(
    channels: int, tmp_path: Path
) -> None:
    file = beside(single_file("sd1"), tmp_path, "sd1")
    tensors = load_file(file)
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(8, channels, 3, 3)
    file.unlink()
    save_file(tensors, file)
    title = f"with {channels} input channels"
    for message in (refusal("sd1", file), refusal(None, file)):
        # another type runs what edits images, from a folder
        is_known = channels == 8 and "folder in diffusers layout only" in message
        assert title in message and ("also takes" in message or is_known)


def test_a_file_that_does_not_say_what_it_is_needs_a_type(tmp_path: Path) -> None:
    file = weights(tmp_path / "x.safetensors", {"anything": (1,)})
    assert (
        f"--type is missing, and --checkpoint={file} does not say what it is. Allowed: sd1"
        in refusal(None, Path(file))
    )


@pytest.mark.parametrize("entries", [{"prior": ["diffusers", "PriorTransformer"]}, {}])
def test_a_class_without_a_unet_or_transformer_has_no_option_that_replaces_it(tmp_path, entries):
    index = {"_class_name": "StableUnCLIPPipeline", **entries}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    spec = generic_spec(tmp_path)
    assert denoiser_files(Settings.from_values({"checkpoint": str(tmp_path)}), spec) == (None, None)
    given = Settings.from_values({"checkpoint": str(tmp_path), "unet": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"--unet was given, but .* Leave it out"):
        denoiser_files(given, spec)
    with pytest.raises(ConfigError, match="neither a UNet nor a transformer"):
        parse_step_cache("prediction", spec)

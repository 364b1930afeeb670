"""Folders and their configuration that do not fit the type are refused before anything starts: what
--check and the launcher say of them.
"""

import json
import shutil
from pathlib import Path

import pytest

from backends.files.pipeline_calls import needed_components
from tests.altered import changed, linked
from tests.checkpoints import (
    NAMES,
    checkpoint,
    motion_adapter,
)
from tests.checkpoints.variants import variant
from tests.every_type import EVERY_TYPE
from tests.hosts.harness import run_launcher
from tests.hosts.launch.fit_planning import SAME_PARTS, TABLE, plan, refusal, without


@pytest.mark.parametrize("name", EVERY_TYPE)
def test_a_folder_runs_as_its_own_type_and_as_no_other(name: str) -> None:
    folder = checkpoint(name)
    assert plan(name, folder).spec.name == name
    for other in TABLE:
        options = {"motion_adapter": str(motion_adapter())} if other == "ad" else {}
        if (
            other == name
            or {name, other} <= SAME_PARTS - {"ad"}
            or TABLE[name].pipeline in TABLE[other].also
            or (other == "ad" and name in SAME_PARTS)
        ):
            assert plan(other, folder, **options).spec.name == other
            continue
        message = refusal(other, folder)
        if TABLE[other].pipeline == TABLE[name].pipeline:  # they differ in their denoisers
            assert "transformer_2" in message and f"Give --type={name}" in message
            continue
        assert f"--checkpoint={folder} is a" in message and f"--type={other} needs a" in message
        assert f"Give --type={name}" in message or (
            name in SAME_PARTS and "Give --type=" in message
        )


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("sd1", "LatentConsistencyModelPipeline"),
        ("sd1", "StableDiffusionControlNetPipeline"),
        ("sd1", "StableDiffusionPAGPipeline"),
        ("sd1", "StableDiffusionAdapterPipeline"),
        ("sdxl", "StableDiffusionXLInstructPix2PixPipeline"),
        ("flux", "FluxControlPipeline"),
        ("qwenimage", "QwenImageLayeredPipeline"),
        ("zimage", "ZImageOmniPipeline"),
        ("pixs", "PixArtSigmaPAGPipeline"),
        ("hy", "HunyuanDiTPAGPipeline"),
        ("svd", "I2VGenXLPipeline"),
        ("ad", "AnimateDiffSDXLPipeline"),
        ("sd3", "StableDiffusion3PAGPipeline"),
        ("sdup", "StableDiffusionLatentUpscalePipeline"),
    ],
)
def test_a_class_that_makes_something_else_of_the_same_parts_is_refused(
    name: str, class_name: str, tmp_path: Path
) -> None:
    index = json.loads((checkpoint(name) / "model_index.json").read_text())
    absent = {part: [None, None] for part in needed_components(class_name) if part not in index}
    folder = changed(checkpoint(name), tmp_path / "model", _class_name=class_name, **absent)
    message = refusal(name, folder)
    assert (
        f" {class_name}, but --type={name} needs" in message
        and "Leave --type out to run it as diffusers has it" in message
        and f"or give a checkpoint of {TABLE[name].title}." in message
    )
    assert plan(None, folder).spec.pipeline == class_name


@pytest.mark.parametrize(
    ("name", "class_name"), [(name, other) for name in NAMES for other in TABLE[name].also]
)
def test_img2img_and_inpainting_classes_of_the_same_parts_are_taken(
    name: str, class_name: str, tmp_path: Path
) -> None:
    folder = changed(checkpoint(name), tmp_path / "model", _class_name=class_name)
    assert plan(name, folder).spec.name == name


def test_an_editing_class_whose_denoiser_takes_an_image_runs_without_the_row(tmp_path: Path):
    folder = changed(
        checkpoint("sdxl", in_channels=8),
        tmp_path / "model",
        _class_name="StableDiffusionXLInstructPix2PixPipeline",
    )
    assert "StableDiffusionXLInstructPix2PixPipeline" in refusal("sdxl", folder)
    spec = plan(None, folder).spec
    assert spec.is_generic and {"image", "prompt"} <= set(spec.takes)


def test_a_folder_may_name_its_class_as_it_was_called_when_it_was_published(tmp_path: Path):
    folder = changed(
        checkpoint("lumina2"), tmp_path / "model", _class_name="Lumina2Text2ImgPipeline"
    )
    assert plan(None, folder).spec.name == "lumina2"


@pytest.mark.parametrize("name", EVERY_TYPE)
@pytest.mark.parametrize("channels", [9, 8, 384, 36])
def test_a_denoiser_with_other_channels_is_refused(
    name: str, channels: int, tmp_path: Path
) -> None:
    denoiser = TABLE[name].denoiser
    config = json.loads((checkpoint(name) / denoiser / "config.json").read_text())
    right, masked = config.get("in_channels"), TABLE[name].fits.get("masked")
    if "channels" not in TABLE[name].fits or channels == right or (channels == 9 and masked):
        return
    folder = changed(
        checkpoint(name), tmp_path / "model", f"{denoiser}/config.json", in_channels=channels
    )
    message = refusal(name, folder)
    assert (
        f"has a {denoiser} with {channels} input channels, but --type={name} needs {right}"
        in message
    )
    if channels == 9 and right == 4:
        assert "it is made for inpainting and also takes a mask" in message


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name in NAMES for key in TABLE[name].fits["text"]]
)
def test_a_denoiser_for_encoders_of_another_width_is_refused(
    name: str, key: str, tmp_path: Path
) -> None:
    denoiser = TABLE[name].denoiser
    folder = changed(checkpoint(name), tmp_path / "model", f"{denoiser}/config.json", **{key: 40})
    assert f"has a {denoiser} with {key}=40, but the checkpoint's parts give" in refusal(
        name, folder
    )


@pytest.mark.parametrize(
    ("name", "key"),
    [
        pytest.param(name, key, marks=() if name in NAMES else pytest.mark.slow)
        for name, spec in TABLE.items()
        for key in spec.fits.get("is", {})
    ],
)
def test_a_denoiser_of_another_kind_is_refused(name: str, key: str, tmp_path: Path) -> None:
    denoiser = TABLE[name].denoiser
    folder = changed(
        checkpoint(name), tmp_path / "model", f"{denoiser}/config.json", **{key: "else"}
    )
    assert f"has a {denoiser} with {key}='else', but --type={name} needs" in refusal(name, folder)


@pytest.mark.parametrize("name", EVERY_TYPE)
def test_a_part_that_is_null_missing_or_without_weights_is_named(name: str, tmp_path: Path) -> None:
    encoder = next(
        part for part in ("text_encoder", "image_encoder") if (checkpoint(name) / part).is_dir()
    )
    for component in (encoder, "vae", TABLE[name].denoiser, "scheduler"):
        folder = without(checkpoint(name), tmp_path / f"null-{component}", component)
        assert f"has no {component}, which --type={name} needs" in refusal(name, folder)
        folder = changed(checkpoint(name), tmp_path / f"gone-{component}")
        shutil.rmtree(folder / component)
        assert f"names a {component}, but the folder {folder / component} is missing" in refusal(
            name, folder
        )
    folder = changed(checkpoint(name), tmp_path / "empty")
    for file in (folder / encoder).glob("*.safetensors"):
        file.unlink()
    assert f"holds no weights of its {encoder}" in refusal(name, folder)


@pytest.mark.parametrize(
    ("class_name", "absent", "told"),
    [
        ("HiDreamImagePipeline", "4", "text_encoder_4 (LlamaForCausalLM), tokenizer_4 (PreTrained"),
        (
            "StableDiffusionPAGPipeline",
            "",
            "text_encoder (CLIPTextModel), tokenizer (CLIPTokenizer",
        ),
    ],
)
def test_an_encoder_that_a_folder_does_not_name_is_told_with_its_class(
    class_name: str, absent: str, told: str, tmp_path: Path
) -> None:
    """HiDream is published without its Llama, whose licence is another one; PAG has no row."""
    folder = changed(variant(class_name), tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    for part in ("text_encoder", "tokenizer"):
        del index[f"{part}_{absent}".strip("_")]
    (folder / "model_index.json").write_text(json.dumps(index))
    message = refusal(None, folder)
    assert f"lacks {told}" in message and "add each in a folder of its name" in message
    assert plan(None, variant(class_name)).spec.pipeline == class_name


@pytest.mark.parametrize("widths", [[32, 40], [40, 32], [32]])
def test_a_denoiser_that_reads_encoders_apart_has_the_width_of_each(
    widths: list[int], tmp_path: Path
) -> None:
    folder = changed(
        checkpoint("hidream"),
        tmp_path / "model",
        "transformer/config.json",
        caption_channels=widths,
    )
    message = refusal("hidream", folder)
    assert f"caption_channels={widths}, but the checkpoint's parts give [32, 32] (" in message


def test_t5_of_sd3_may_be_left_out(tmp_path: Path) -> None:
    folder = changed(
        checkpoint("sd3"), tmp_path / "model", text_encoder_3=[None, None], tokenizer_3=[None, None]
    )
    assert plan("sd3", folder).spec.name == "sd3"


def test_a_download_that_broke_off_is_refused(tmp_path: Path) -> None:
    folder = changed(checkpoint("flux"), tmp_path / "model")
    index = {"weight_map": {"a": "diffusion_pytorch_model-00002-of-00002.safetensors"}}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps(index)
    )
    assert plan("flux", folder).spec.name == "flux"  # the index of a precision that was left out
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").rename(
        folder / "transformer" / "x-00001-of-00002.safetensors"
    )
    assert "lacks transformer/diffusion_pytorch_model-00002-of-00002.safetensors" in refusal(
        "flux", folder
    )
    shutil.copy(checkpoint("flux") / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    (folder / "transformer" / "x-00001-of-00002.safetensors").rename(
        folder / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(
        content[: len(content) // 2]
    )
    assert "cannot be read (safetensors): its tensors end at byte" in refusal("flux", folder)


def test_the_refiner_is_refused_by_its_name(tmp_path: Path) -> None:
    fields = {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True}
    folder = changed(checkpoint("sdxl"), tmp_path / "model", **fields)
    assert "is the refiner of Stable Diffusion XL: it continues another model's latents" in refusal(
        "sdxl", folder
    )
    config = {"projection_class_embeddings_input_dim": 5 * 8 + 64, "addition_time_embed_dim": 8}
    folder = changed(checkpoint("sdxl"), tmp_path / "other", "unet/config.json", **config)
    assert (
        "projection_class_embeddings_input_dim=104, but the checkpoint's parts give 112"
        in refusal("sdxl", folder)
    )


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'{"a": 1,', "is not JSON"),
        (b"[1]", "holds a list instead of an object"),
        (b'{"a": "\xff"}', "is not JSON"),
        (b"", "is not JSON"),
    ],
)
@pytest.mark.parametrize(
    "name",
    ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
     "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"],
)  # fmt: skip
def test_a_broken_configuration_is_named(
    name: str, content: bytes, what: str, tmp_path: Path
) -> None:
    folder = linked(checkpoint("sdxl"), tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(content)
    for type_name in ("sdxl", None):
        message = refusal(type_name, folder)
        assert message.startswith(f"{folder / name} {what}"), message


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder_2", "scheduler", "tokenizer"])
def test_a_component_without_its_configuration_is_refused(component: str, tmp_path: Path) -> None:
    folder = linked(checkpoint("sdxl"), tmp_path / "model")
    for file in (folder / component).glob("*.json" if component != "tokenizer" else "*"):
        file.unlink()
    assert f"--checkpoint={folder} lacks {component}/" in refusal("sdxl", folder)


@pytest.mark.parametrize("name", EVERY_TYPE)
def test_the_type_follows_from_the_folder(name: str) -> None:
    start = plan(None, checkpoint(name))
    assert start.spec.name == name
    assert any(reason.startswith(f"type={name}: the checkpoint is a") for reason in start.reasons)


def test_the_type_of_an_sd1_folder_with_motion_modules_is_animatediff() -> None:
    assert plan(None, checkpoint("sd1"), motion_adapter=str(motion_adapter())).spec.name == "ad"


def test_a_folder_that_is_no_checkpoint_says_so(tmp_path: Path) -> None:
    assert f"--checkpoint={tmp_path} holds no model_index.json that names a pipeline" in refusal(
        None, tmp_path
    )


def test_the_launcher_refuses_in_one_line_with_exit_code_2() -> None:
    done = run_launcher("--type=sdxl", f"--checkpoint={checkpoint('sd1')}", "--check")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"error: --checkpoint={checkpoint('sd1')} is a StableDiffusionPipeline, but --type=sdxl "
        "needs a StableDiffusionXLPipeline. "
        "Give --type=sd1 or --type=sd2 or --type=ad."
    )

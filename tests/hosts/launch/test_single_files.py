"""Single-file checkpoints: where their configuration comes from."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file

from backends.errors import ConfigError
from backends.files.recognition import configuration_of, recognize
from backends.files.weight_headers import Header
from backends.generation.pipeline import load_pipeline
from backends.model_table import read_table
from backends.request import GenerateRequest
from hosts.launch.settings import Settings
from hosts.launch.start_plan import StartPlan, plan_start
from tests.checkpoints import checkpoint, gguf, lora, single_file
from tests.hosts.harness import run_launcher

TABLE = read_table()
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
DEV = "black-forest-labs/FLUX.1-dev"


def plan(file: Path, **options: object) -> StartPlan:
    values = {"checkpoint": str(file), "height": 64, "width": 64, **options}
    return plan_start(Settings.from_values(values), TABLE, num_gpus=0, num_ranks=1)


def refusal(file: Path, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(file, **options)
    return str(caught.value)


def fetched(file: Path, **options: object) -> StartPlan:
    plan(file, **options).hub.download(lambda done, total: None)
    start = plan(file, **options, offline=True)
    assert not start.hub.missing
    return start


def image(start: StartPlan):
    pipeline = load_pipeline(start.spec, start.load, device=torch.device("cpu"))
    request = GenerateRequest(prompt="a cat", seed=3, num_inference_steps=2)
    return pipeline.generate(request).frames


@pytest.fixture
def alone(tmp_path) -> dict[str, Path]:
    """Type -> a single file with nothing beside it."""
    found = {}
    for name in ("sdxl", "flux"):
        found[name] = tmp_path / f"{name} finetune.safetensors"
        shutil.copy(single_file(name, seed=1), found[name])
    return found


def test_the_configuration_comes_from_the_hub_without_weights_that_the_file_has(hub, alone):
    hub.add(SDXL, checkpoint("sdxl"))
    start = fetched(alone["sdxl"])
    assert start.spec.name == "sdxl" and not hub.downloads(".safetensors")
    assert start.hub.named(start.load.checkpoint_config).startswith(f"{SDXL}@")
    beside = alone["sdxl"].with_suffix("")
    shutil.copytree(checkpoint("sdxl"), beside, ignore=shutil.ignore_patterns("*.safetensors"))
    asked = len(hub.requests)
    wanted = plan(alone["sdxl"])
    assert wanted.load.checkpoint_config == str(beside) and len(hub.requests) == asked
    assert (image(start) == image(wanted)).all()


def test_components_that_the_file_lacks_come_from_the_hub(hub, alone):
    hub.add(DEV, checkpoint("flux"))
    start = fetched(alone["flux"])
    assert sorted(hub.downloads(".safetensors")) == [
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    other = plan(checkpoint("flux"), transformer=str(alone["flux"]))
    assert (image(start) == image(other)).all()


ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
MEDIUM = "stabilityai/stable-diffusion-3-medium-diffusers"


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        ("sd3", ("vae",)),  # sd3_medium, sd3.5_large
        ("sd3", ("vae", *ENCODERS[:2])),  # sd3_medium_incl_clips
        ("sd3", ("vae", *ENCODERS)),  # sd3_medium_incl_clips_t5xxlfp8
        ("flux", ("vae", *ENCODERS[:2])),  # flux1-dev-fp8 of ComfyUI
    ],
)
def test_each_component_comes_from_the_file_or_else_from_the_hub(hub, name, holds):
    """The weights of the hub's have another seed than those of the file."""
    hub.add(MEDIUM if name == "sd3" else DEV, checkpoint(name))
    start = fetched(single_file(name, seed=1, holds=holds))
    own = json.loads((checkpoint(name) / "model_index.json").read_text())
    needed = [part for part in (*ENCODERS, "vae") if part in own]
    downloaded = {file.partition("/")[0] for file in hub.downloads(".safetensors")}
    assert start.spec.name == name and downloaded == set(needed) - set(holds)
    pipe = load_pipeline(start.spec, start.load, device=torch.device("cpu")).pipe
    for part in ("transformer", *needed):
        seed = int(part in holds or part == "transformer")
        wanted = weights_of(checkpoint(name, seed=seed) / part)
        found = getattr(pipe, part).state_dict()
        for key, tensor in wanted.items():
            if key == "text_projection.weight" and seed and part == "text_encoder":
                tensor = torch.eye(len(tensor))  # these files leave it out
            assert torch.equal(found[key].float(), tensor), f"{part} {key}"


def weights_of(folder: Path):
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("is_scaled", [False, True])
def test_encoders_in_8_bits_are_read(alone, tmp_path, is_scaled):
    """With scales, or without: T5 in sd3_medium_incl_clips_t5xxlfp8."""
    packed = {}
    for key, tensor in load_file(single_file("sd3", seed=1, holds=ENCODERS)).items():
        if not (key.startswith("text_encoders.t5xxl.") and key.endswith(".weight")):
            packed[key] = tensor
        elif is_scaled and tensor.ndim == 2:
            packed[key] = (tensor / 2).to(torch.float8_e4m3fn)
            packed[f"{key.removesuffix('weight')}scale_weight"] = torch.full((1,), 2.0)
        else:
            packed[key] = tensor.to(torch.float8_e4m3fn)
    file = tmp_path / "sd3.safetensors"
    save_file(packed, file)
    start = plan(file, checkpoint_config=str(checkpoint("sd3")), variant="fp32")
    found = load_pipeline(start.spec, start.load, device=torch.device("cpu")).pipe.text_encoder_3
    key = "encoder.block.0.layer.0.SelfAttention.q.weight"
    stored = packed[f"text_encoders.t5xxl.transformer.{key}"].float()
    assert torch.equal(found.state_dict()[key], stored * (2 if is_scaled else 1))


def test_a_pickle_is_a_checkpoint_too(alone, tmp_path):
    """In the formats of torch before 1.6 and since; its code is never run."""
    images = [image(plan(alone["sdxl"], checkpoint_config=str(checkpoint("sdxl"))))]
    for number, is_zip in enumerate((True, False)):
        file = tmp_path / f"{number}.ckpt"
        content = {"state_dict": load_file(alone["sdxl"]), "global_step": 3}
        torch.save(content, file, _use_new_zipfile_serialization=is_zip)
        start = plan(file, checkpoint_config=str(checkpoint("sdxl")))
        assert start.spec.name == "sdxl"
        images.append(image(start))
    assert (images[1] == images[0]).all() and (images[2] == images[0]).all()
    torch.save({"state_dict": {}, "callbacks": {Path: Path("x")}}, file)
    message = refusal(file)
    assert f"--checkpoint={file} cannot be read: it holds a pathlib" in message
    assert "Give a .safetensors file; code in a file is never run." in message
    file.write_bytes(file.read_bytes()[:100])
    assert "is damaged or incomplete" in refusal(file)


def test_a_pickle_on_a_hub_is_downloaded_first(hub, alone, tmp_path):
    file = tmp_path / "old.ckpt"
    torch.save(load_file(alone["sdxl"]), file)
    hub.add("acme/old", {"v1/old.ckpt": file})
    message = refusal("acme/old/v1/old.ckpt")
    command = message.split("`")[1]
    assert command == "hf download acme/old v1/old.ckpt"
    program, *arguments = shlex.split(command)
    subprocess.run([Path(sys.executable).with_name(program), *arguments], check=True, timeout=60)
    start = plan("acme/old/v1/old.ckpt", checkpoint_config=str(checkpoint("sdxl")))
    assert start.spec.name == "sdxl" and not start.hub.missing


def test_a_gguf_file_is_the_denoiser_of_its_configuration(hub, tmp_path):
    hub.add(DEV, checkpoint("flux"))
    file = tmp_path / "flux1-dev-Q8_0.gguf"
    shutil.copy(gguf("flux", seed=1), file)
    start = fetched(file)
    assert "transformer/diffusion_pytorch_model.safetensors" not in hub.downloads(".safetensors")
    assert start.load.gguf_model == str(file)
    assert any(
        reason.startswith("flux1-dev-Q8_0.gguf is the transformer") for reason in start.reasons
    )
    wanted = plan(checkpoint("flux"), gguf_model=str(file))
    assert (image(start) == image(wanted)).all()
    message = refusal(file, transformer=str(checkpoint("flux", seed=1)))
    assert "is a transformer in GGUF, and --transformer gives another one." in message


def in_gguf(source: Path, target: Path) -> Path:
    """Write a single file as stable-diffusion.cpp converts one: all its parts, matrices in 8 bits.
    Return a .safetensors file beside it with the values that those have.
    """
    kind, values = GGMLQuantizationType.Q8_0, {}
    writer = GGUFWriter(target, "sd")
    for name, tensor in load_file(source).items():
        array = np.atleast_1d(tensor.float().numpy())
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            packed = quantize(array, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
            array = dequantize(packed, kind)
        else:
            writer.add_tensor(name, array)
        values[name] = torch.from_numpy(array.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(values, target.with_suffix(".safetensors"))
    return target.with_suffix(".safetensors")


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_all_parts_of_a_gguf_file_are_used(name, tmp_path):
    file = tmp_path / "finetune-q8_0.gguf"
    same = in_gguf(single_file(name, seed=1), file)
    start = plan(file, checkpoint_config=str(checkpoint(name)))
    assert start.spec.name == name and start.load.gguf_model == str(file)
    assert any("holds unet, vae, text_encoder" in reason for reason in start.reasons)
    found = image(start)
    wanted = image(plan(same, checkpoint_config=str(checkpoint(name))))
    assert abs(found.astype(int) - wanted).max() <= 1


def test_text_encoders_under_unknown_names_are_refused(tmp_path):
    """stable-diffusion.cpp can rename SDXL's, and then does not say how their projection lies."""
    weights = {
        name.replace("conditioner.embedders.0", "cond_stage_model"): tensor
        for name, tensor in load_file(single_file("sdxl")).items()
    }
    save_file(weights, tmp_path / "renamed.safetensors")
    message = refusal(tmp_path / "renamed.safetensors", checkpoint_config=str(checkpoint("sdxl")))
    assert "a text encoder under names that are not those of Stable Diffusion XL" in message
    assert "Allowed: conditioner.embedders.0., conditioner.embedders.1." in message


def test_text_encoder_that_is_not_read_is_told(tmp_path):
    file = tmp_path / "all in one.safetensors"
    weights = load_file(single_file("zimage"))
    encoder = {"text_encoders.qwen3_4b.model.norm.weight": torch.ones(8)}
    save_file({f"model.diffusion_model.{key}": t for key, t in weights.items()} | encoder, file)
    reasons = plan(file, checkpoint_config=str(checkpoint("zimage"))).reasons
    assert any("a text encoder too, which is not read" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("name", "repository"),
    [("zimage", "Tongyi-MAI/Z-Image-Turbo"), ("wan_t2v", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers")],
)
def test_a_transformer_alone_is_completed_by_the_hub(hub, name, repository):
    hub.add(repository, checkpoint(name))
    start = fetched(single_file(name, seed=1))
    assert start.spec.name == name
    assert not [file for file in hub.downloads(".safetensors") if file.startswith("transformer")]
    pipe = load_pipeline(start.spec, start.load, device=torch.device("cpu")).pipe
    wanted = weights_of(checkpoint(name, seed=1) / "transformer")
    found = pipe.transformer.state_dict()
    assert all(torch.equal(found[key].float(), tensor) for key, tensor in wanted.items())


def test_text_encoders_in_the_file_win_over_those_of_its_configuration(alone):
    """A finetune's own text encoders, not those of a whole checkpoint given as configuration."""
    start = plan(alone["sdxl"], checkpoint_config=str(checkpoint("sdxl", seed=0)))
    own = plan(alone["sdxl"], checkpoint_config=str(checkpoint("sdxl", seed=1)))
    assert (image(start) == image(own)).all()


def test_one_file_of_a_repository_as_checkpoint(hub, alone):
    """Its type and configuration are known by its header, before it is downloaded."""
    hub.add(SDXL, checkpoint("sdxl"))
    hub.add("acme/merges", {"v2/best.safetensors": alone["sdxl"], "old.safetensors": alone["flux"]})
    start = plan("acme/merges/v2/best.safetensors")
    assert start.spec.name == "sdxl" and start.facts()["download"] == "2.4 MB"
    assert not hub.downloads(".safetensors")
    start = fetched("acme/merges/v2/best.safetensors")
    assert hub.downloads(".safetensors") == ["v2/best.safetensors"]
    assert (image(start) == image(plan(alone["sdxl"], offline=True))).all()


def test_a_name_as_configuration(hub, alone):
    hub.add("acme/base", checkpoint("sdxl"))
    start = fetched(alone["sdxl"], checkpoint_config="acme/base")
    assert (Path(start.load.checkpoint_config) / "model_index.json").is_file()
    assert not hub.downloads(".safetensors")


def test_offline_the_message_has_the_command_that_downloads_the_configuration(hub, alone):
    hub.add(SDXL, checkpoint("sdxl"))
    message = refusal(alone["sdxl"], offline=True)
    assert message.startswith(f"--checkpoint={alone['sdxl']} is one file, and its configuration is")
    assert "--checkpoint_config=FOLDER" in message
    command = message.split("`")[1]
    assert command == f'hf download {SDXL} --include "*.json" --include "*.txt" --include "*.model"'
    program, *arguments = shlex.split(command)
    done = subprocess.run(
        [Path(sys.executable).with_name(program), *arguments], capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert not hub.downloads(".safetensors")
    assert plan(alone["sdxl"], offline=True).load.checkpoint_config is not None


def test_the_command_downloads_what_the_file_lacks(hub, tmp_path):
    file = tmp_path / "sd3_medium_incl_clips.safetensors"
    shutil.copy(single_file("sd3", seed=1, holds=("vae", *ENCODERS[:2])), file)
    hub.add(MEDIUM, checkpoint("sd3"))
    program, *arguments = shlex.split(refusal(file, offline=True).split("`")[1])
    subprocess.run([Path(sys.executable).with_name(program), *arguments], check=True, timeout=60)
    assert hub.downloads(".safetensors") == ["text_encoder_3/model.safetensors"]
    assert not plan(file, offline=True).hub.missing


def test_a_wrong_configuration_is_refused(alone, tmp_path):
    message = refusal(alone["sdxl"], checkpoint_config=str(tmp_path))
    assert "holds no model_index.json" in message
    message = refusal(checkpoint("sdxl"), checkpoint_config=str(checkpoint("sdxl")))
    assert "is a folder with a configuration of its own. Leave it out." in message
    other = tmp_path / "old.zip"
    other.touch()
    assert "is a file, but type 'sdxl' needs one of .safetensors" in refusal(other, type="sdxl")
    assert "is a file, but type 'hy' needs a folder" in refusal(other, type="hy")
    message = refusal(alone["sdxl"], checkpoint_config="/nowhere")
    assert message.startswith("--checkpoint_config=/nowhere does not exist.")


def test_flux2_klein_is_told_from_dev_by_its_lack_of_guidance():
    tensors = ("single_stream_modulation.lin.weight", "double_blocks.0.img_attn.qkv.weight")
    for more, types in (
        ((), ("flux2_klein", "flux2")),
        (("guidance_in.in_layer.weight",), ("flux2", "flux2_klein")),
    ):
        shapes = dict.fromkeys((*tensors, *more), (8, 8))
        assert recognize(Header(shapes=shapes)).types == types


def test_the_architecture_names_the_repository():
    def named(type_name: str, *tensors: str) -> str | None:
        header = Header(shapes=dict.fromkeys(tensors, (1,)), dtypes={}, metadata={})
        return configuration_of(header, TABLE[type_name])

    assert named("sdxl", "conv_in.weight") == SDXL
    assert named("flux", "guidance_in.in_layer.weight") == DEV
    assert named("flux", "model.diffusion_model.guidance_in.in_layer.weight") == DEV
    assert named("flux", "double_blocks.0.img_attn.qkv.weight").endswith("FLUX.1-schnell")
    assert named("sd3", "joint_blocks.0.x_block.attn.qkv.weight") == MEDIUM
    large = "model.diffusion_model.joint_blocks.37.x_block.mlp.fc1.weight"
    assert named("sd3", large).endswith("3.5-large")
    assert named("sd3", "joint_blocks.0.x_block.attn2.qkv.weight").endswith("3.5-medium")
    assert named("flux2_klein", "double_blocks.4.img_attn.qkv.weight").endswith("klein-4B")
    assert named("flux2_klein", "double_blocks.5.img_attn.qkv.weight").endswith("klein-9B")
    assert named("wan_t2v", "blocks.39.self_attn.q.weight").endswith("T2V-14B-Diffusers")


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ("https://huggingface.co/acme/tiny", "Give the name: acme/tiny."),
        (
            "https://huggingface.co/acme/tiny/blob/main/v2/a.safetensors?download=true",
            "Give the name: acme/tiny/v2/a.safetensors.",
        ),
        ("https://hf.co/acme/tiny/tree/v1", "Give the name: acme/tiny@v1."),
        ("https://civitai.com/api/download/models/1", "Download the file, and give its path."),
        ("sdxl.safetensors", "does not exist. Give the path of a file or folder"),
    ],
)
def test_an_address_or_a_missing_file_is_answered_with_what_to_give(given, advice):
    assert advice in refusal(given)


def test_a_file_of_another_kind_is_answered_with_its_option(tmp_path):
    message = refusal(lora("sdxl"))
    assert "is a LoRA. Give it with --lora, and the model it was made for as" in message
    page = tmp_path / "model.safetensors"
    page.write_text("<!DOCTYPE html><html><body>Log in</body></html>")
    assert "it is a web page; the download may have needed a login" in refusal(page)
    archive = tmp_path / "model.zip"
    archive.write_bytes(b"PK")
    assert "is not a file of weights. Allowed: a folder in diffusers layout," in refusal(archive)
    done = run_launcher("model.safetensors", "--check")
    assert done.returncode == 2
    assert "Give a model as --checkpoint=model.safetensors." in done.stderr

"""Single-file checkpoints: where their configuration comes from."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backends.errors import ConfigError
from backends.files.recognition import configuration_of
from backends.files.weight_headers import Header
from backends.generation.pipeline import load_pipeline
from backends.model_table import read_table
from backends.request import GenerateRequest
from hosts.launch.settings import Settings
from hosts.launch.start_plan import StartPlan, plan_start
from tests.checkpoints import checkpoint, single_file

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
    assert wanted.load.checkpoint_config is None and len(hub.requests) == asked
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


def test_a_wrong_configuration_is_refused(alone, tmp_path):
    message = refusal(alone["sdxl"], checkpoint_config=str(tmp_path))
    assert "holds no model_index.json" in message
    message = refusal(checkpoint("sdxl"), checkpoint_config=str(checkpoint("sdxl")))
    assert "is a folder with a configuration of its own. Leave it out." in message
    other = tmp_path / "old.ckpt"
    other.touch()
    assert "is a file, but type 'sdxl' needs a folder" in refusal(other, type="sdxl")
    message = refusal(alone["sdxl"], checkpoint_config="/nowhere")
    assert message.startswith("--checkpoint_config=/nowhere does not exist.")


def test_the_architecture_names_the_repository():
    def named(type_name: str, *tensors: str) -> str | None:
        header = Header(shapes=dict.fromkeys(tensors, (1,)), dtypes={}, metadata={})
        return configuration_of(header, TABLE[type_name])

    assert named("sdxl", "conv_in.weight") == SDXL
    assert named("flux", "guidance_in.in_layer.weight") == DEV
    assert named("flux", "model.diffusion_model.guidance_in.in_layer.weight") == DEV
    assert named("flux", "double_blocks.0.img_attn.qkv.weight").endswith("FLUX.1-schnell")

"""Names on a hub among the launch arguments: the plan is made before their weights are here."""

import json
from pathlib import Path

import pytest

from backends.errors import ConfigError
from backends.model_table import read_table
from hosts.launch.settings import Settings
from hosts.launch.start_plan import StartPlan, plan_start
from tests.altered import changed
from tests.checkpoints import (
    IP_ADAPTER_FILE,
    checkpoint,
    controlnet,
    gguf,
    ip_adapter,
    lora,
    motion_adapter,
)
from tests.checkpoints.variants import variant
from tests.hosts.harness import run_launcher

TABLE = read_table()


def plan(**options: object) -> StartPlan:
    return plan_start(Settings.from_values(options), TABLE, num_gpus=0, num_ranks=1)


def refusal(**options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(**options)
    return str(caught.value)


def fetched(**options: object) -> StartPlan:
    """The plan once everything is here."""
    plan(**options).hub.download(lambda done, total: None)
    start = plan(**options, offline=True)
    assert not start.hub.missing
    return start


def test_type_and_methods_are_known_before_the_weights_are_here(hub):
    hub.add("acme/tiny", checkpoint("sdxl"))
    start = plan(checkpoint="acme/tiny")
    facts = start.facts()
    commit = hub.repositories["acme/tiny"].commit
    assert (facts["type"], facts["checkpoint"]) == ("sdxl", f"acme/tiny@{commit[:12]}")
    assert facts["download"] == "2.4 MB" and not hub.downloads(".safetensors")
    assert "download" not in fetched(checkpoint="acme/tiny").facts()


def test_a_type_that_does_not_fit_is_refused_before_the_download(hub):
    hub.add("acme/tiny", checkpoint("flux"))
    message = refusal(checkpoint="acme/tiny", type="sdxl")
    assert message.startswith("--checkpoint=acme/tiny@") and "Give --type=flux." in message
    assert not hub.downloads(".safetensors")


def test_a_path_that_exists_wins(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("acme").mkdir()
    Path("acme/tiny").symlink_to(checkpoint("sdxl"))
    assert plan(checkpoint="acme/tiny").load.checkpoint == str(tmp_path / "acme/tiny")
    assert not hub.requests


def test_every_option_for_files_takes_a_name(hub):
    hub.add("acme/tiny", checkpoint("sd1"))
    hub.add("acme/other", checkpoint("sd1", seed=1))
    hub.add("acme/control", controlnet("sd1"))
    hub.add("acme/style", {"pytorch_lora_weights.safetensors": Path(lora("sd1"))})
    hub.add("acme/images", ip_adapter("sd1"))
    start = fetched(
        type="sd1",
        checkpoint="acme/tiny",
        vae="acme/other",
        unet="acme/other",
        control_net="acme/control",
        lora='{"acme/style": 0.5}',
        ip_adapter=f"acme/images/{IP_ADAPTER_FILE}",
    )
    load = start.load
    assert (Path(load.vae) / "vae/config.json").is_file()
    assert (Path(load.denoiser) / "unet/config.json").is_file()
    assert [Path(path).is_dir() for path in load.control_net] == [True]
    assert {Path(path).name: scale for path, scale in load.lora.items()} == {
        "pytorch_lora_weights.safetensors": 0.5
    }
    assert all(Path(path).parent.joinpath("image_encoder").is_dir() for path in load.ip_adapter)
    assert not list(Path(load.checkpoint).glob("unet/*.safetensors"))


def test_motion_adapter_and_gguf_take_a_name(hub):
    hub.add("acme/motion", motion_adapter())
    load = fetched(type="ad", checkpoint=str(checkpoint("sd1")), motion_adapter="acme/motion").load
    assert (Path(load.motion_adapter) / "config.json").is_file()
    hub.add("acme/packed", {"model-Q8_0.gguf": Path(gguf("flux"))})
    load = fetched(checkpoint=str(checkpoint("flux")), gguf_model="acme/packed").load
    assert Path(load.gguf_model).read_bytes() == Path(gguf("flux")).read_bytes()


def test_code_of_a_repository_is_never_run(hub, tmp_path):
    source = changed(checkpoint("sdxl"), tmp_path / "own", unet=["my_unet", "MyUNet"])
    (source / "unet" / "my_unet.py").write_text("raise SystemExit('this code was run')")
    hub.add("acme/own", source)
    message = refusal(checkpoint="acme/own")
    assert "has a unet of class my_unet.MyUNet" in message and "never run" in message
    assert not hub.downloads(".py")


def test_a_modular_pipeline_starts_by_its_name(hub):
    hub.add("acme/modular", variant("ZImageModularPipeline"))
    start = fetched(checkpoint="acme/modular")
    assert (start.spec.is_generic, start.spec.title) == (True, "ZImageModularPipeline")
    assert {path.partition("/")[0] for path in hub.downloads(".safetensors")} == {
        "text_encoder",
        "transformer",
        "vae",
    }


def test_check_says_what_would_be_downloaded(hub):
    hub.add("acme/tiny", checkpoint("sdxl"))
    done = run_launcher("--checkpoint=acme/tiny", "--check", "--json")
    assert json.loads(done.stdout)["download"] == "2.4 MB", done.stderr
    done = run_launcher("--checkpoint=acme/none", "--check")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --checkpoint=acme/none is neither a path on this machine")
    done = run_launcher("--checkpoint=acme/other", "--check", "--offline")
    assert done.returncode == 2 and "Run `hf download acme/other` while online" in done.stderr


def test_flux2_klein_starts_by_its_name(hub, tmp_path):
    """Its repository also holds the transformer as one file, which is not downloaded."""
    name, folder = "black-forest-labs/FLUX.2-klein-4B", checkpoint("flux2_klein")
    whole = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    hub.add(name, folder)
    hub.repositories[name].files["flux-2-klein-4b.safetensors"] = whole
    start = fetched(checkpoint=name)
    assert start.spec.name == "flux2_klein"
    assert "flux-2-klein-4b.safetensors" not in hub.downloads(".safetensors")
    assert {path.partition("/")[0] for path in hub.downloads(".safetensors")} == {
        "text_encoder",
        "transformer",
        "vae",
    }
    generic = plan(checkpoint=name, type="generic", offline=True)
    assert generic.spec.pipeline == "Flux2KleinPipeline" and not generic.hub.missing

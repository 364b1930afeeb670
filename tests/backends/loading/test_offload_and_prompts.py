"""Offloading, lean attention, Compel and replaced weights on one device."""

import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file

from backends.errors import ConfigError, UnsupportedError
from backends.loading.offload import offload
from tests.backends.features import CPU, TABLE, loaded, request_for
from tests.backends.loading.test_adapters import difference, draw
from tests.checkpoints import checkpoint, controlnet, gguf, lora, motion_adapter, sample_image


@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
def test_without_an_accelerator_offloading_warns_and_the_host_runs(kind, caplog):
    pipe = loaded(TABLE["pixa"], offload=kind)
    assert f"offload={kind} has no effect: there is no accelerator" in caplog.text
    assert difference(draw(pipe), draw(loaded(TABLE["pixa"]))) == 0


@pytest.mark.parametrize("kind", ["model", "group"])
def test_offloaded_pipelines_draw_the_same_again_and_again(kind, caplog):
    """On the CPU for both places: the hooks are the same, only nothing moves far."""
    want = draw(loaded(TABLE["pixa"]))
    pipe = loaded(TABLE["pixa"])
    offload(pipe.pipe, TABLE["pixa"], kind, device=CPU)
    is_slow = kind == "group"  # without prefetching
    assert ("sequential_cpu_offload copies half as much" in caplog.text) == is_slow
    before = pipe.pipe.transformer.forward
    assert difference(draw(pipe), want) == 0
    assert (
        pipe.pipe.transformer.forward == before
    )  # what a backend attaches around it is not lost after the first image
    assert difference(draw(pipe), want) == 0


def test_group_offloading_is_refused_where_diffusers_has_none():
    with pytest.raises(
        UnsupportedError,
        match=(
            r"enable_group_offload is not available for HunyuanDiT: .* Use "
            r"--enable_model_cpu_offload"
        ),
    ):
        offload(loaded(TABLE["hy"]).pipe, TABLE["hy"], "group", device=CPU)


def test_attention_slicing_draws_the_same_and_missing_xformers_only_warn(caplog):
    want = draw(loaded(TABLE["sd1"]))
    pipe = loaded(TABLE["sd1"], enable_attention_slicing=True)
    assert {type(processor).__name__ for processor in pipe.pipe.unet.attn_processors.values()} == {
        "SlicedAttnProcessor"
    }
    assert difference(draw(pipe), want) <= 1
    with caplog.at_level(logging.WARNING):
        loaded(TABLE["sd1"], xformers_efficient=True)
    assert "xformers_efficient has no effect: xformers is not installed" in caplog.text


@pytest.mark.parametrize("name", [pytest.param("sd1", marks=pytest.mark.slow), "sdxl", "flux"])
def test_compel_reads_plain_prompts_as_the_pipeline_does_and_weighs_the_others(name):
    pipe = loaded(TABLE[name], compel=True)
    assert difference(draw(pipe), draw(loaded(TABLE[name]))) <= 1
    assert difference(draw(pipe, prompt="a photo of a (cat)1.6"), draw(pipe)) > 2
    assert difference(draw(pipe, prompt="a photo of a cat++"), draw(pipe)) > 2


@pytest.mark.parametrize("name", [pytest.param("sd1", marks=pytest.mark.slow), "sdxl"])
def test_long_prompts_are_read_to_their_end_by_compel_and_reported_without(name, caplog):
    beginning = "a photo of a cat, " * 40
    pipe, plain = loaded(TABLE[name], compel=True), loaded(TABLE[name])
    asked = {"prompt": beginning + "red", "negative_prompt": "blue"}
    assert (
        difference(draw(pipe, **asked), draw(pipe, **{**asked, "prompt": beginning + "blue car"}))
        > 0
    )
    assert (
        difference(draw(plain, **asked), draw(plain, **{**asked, "prompt": beginning + "blue car"}))
        == 0
    )
    report = plain.generate(request_for(TABLE[name], height=64, width=64, **asked)).report
    assert report["unread_tokens"] > 100
    assert "tokens of the prompt were ignored; --compel would read them" in caplog.text
    assert (
        "unread_tokens"
        not in pipe.generate(request_for(TABLE[name], height=64, width=64, **asked)).report
    )


def test_compel_and_clip_skip_do_not_go_together():
    with pytest.raises(
        UnsupportedError,
        match="clip_skip=1 is not available on a host that was started with --compel",
    ):
        draw(loaded(TABLE["sd1"], compel=True), clip_skip=1)


def test_compel_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "compel", None)
    with pytest.raises(ConfigError, match="--compel needs the package compel"):
        loaded(TABLE["sd1"], compel=True)


@pytest.mark.parametrize("source", ["folder", "whole checkpoint", "file", "pickle"])
def test_a_replacement_denoiser_is_the_one_that_draws(source, tmp_path):
    other = checkpoint("pixa", seed=4)
    paths = {"folder": other / "transformer", "whole checkpoint": other}
    file = other / "transformer" / "diffusion_pytorch_model.safetensors"
    if source == "file":
        paths["file"] = shutil.copy(file, tmp_path / "x.safetensors")
    if source == "pickle":
        paths["pickle"] = tmp_path / "x.pth"
        torch.save(load_file(file), paths["pickle"])
    replaced = draw(loaded(TABLE["pixa"], denoiser=str(paths[source])))
    assert difference(replaced, draw(loaded(TABLE["pixa"]))) > 5
    assert (
        difference(replaced, draw(loaded(TABLE["pixa"], denoiser=str(other / "transformer")))) == 0
    )


def test_a_replacement_that_does_not_fit_its_configuration_counts_the_keys(tmp_path):
    file = checkpoint("pixa", num_layers=3) / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(
        ConfigError,
        match=r"transformer=.* does not fit: \d+ tensors are missing \(transformer_blocks\.3",
    ):
        loaded(TABLE["pixa"], denoiser=str(file))


def test_a_motion_module_in_one_file_is_the_adapter(tmp_path):
    folder = motion_adapter(seed=1)
    asked = {"num_frames": 2}
    from_folder = draw(motion_pipe(motion_adapter=str(folder)), **asked)
    file = shutil.copy(folder / "diffusion_pytorch_model.safetensors", tmp_path / "mm.safetensors")
    config = {"motion_config": str(folder / "config.json")}
    assert (
        difference(draw(motion_pipe(motion_module=str(file), **config), **asked), from_folder) == 0
    )
    shutil.copy(folder / "config.json", tmp_path)
    assert difference(draw(motion_pipe(motion_module=str(file)), **asked), from_folder) == 0


def motion_pipe(**load):
    from backends.generation.pipeline import load_pipeline
    from backends.request import LoadRequest

    request = LoadRequest(
        model_type="ad", checkpoint=str(checkpoint("sd1")), variant="fp32", **load
    )
    return load_pipeline(TABLE["ad"], request, device=CPU)


def test_a_controlnet_in_one_file_needs_its_configuration(tmp_path):
    folder = controlnet("hy")
    file = str(
        shutil.copy(folder / "diffusion_pytorch_model.safetensors", tmp_path / "net.safetensors")
    )
    with pytest.raises(
        ConfigError,
        match=(
            r"is a file, so its configuration is needed too. Give "
            r"--control_net_config=CONFIG.JSON"
        ),
    ):
        loaded(TABLE["hy"], control_net={file: 1.0})
    pipe = loaded(
        TABLE["hy"], control_net={file: 1.0}, control_net_config=str(folder / "config.json")
    )
    asked = {"control_image": sample_image(40)}
    assert (
        difference(
            draw(pipe, **asked), draw(loaded(TABLE["hy"], control_net={str(folder): 1.0}), **asked)
        )
        == 0
    )


def test_a_lora_acts_on_gguf_weights():
    path = str(gguf("flux", "Q4_0"))
    base = draw(loaded(TABLE["flux"], gguf_model=path))
    pipe = loaded(TABLE["flux"], gguf_model=path, lora={str(lora("flux")): 0.8})
    assert difference(draw(pipe), base) > 5
    assert difference(draw(pipe, lora={}), base) == 0


def test_a_broken_gguf_is_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        ConfigError, match=r"--gguf_model=.*x\.gguf cannot be read \(gguf\): .*download it again"
    ):
        loaded(TABLE["flux"], gguf_model=str(tmp_path / "x.gguf"))

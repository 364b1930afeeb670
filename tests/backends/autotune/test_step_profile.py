"""What a survey of one step counts, and what the configuration alone says of it."""

import argparse

import pytest
import torch
from torch import nn

from backends.autotune.estimate import DEVICES, count_weights, estimate_checkpoint
from backends.autotune.step_profile import bytes_of, surveyed
from backends.autotune.trials import PipelineSubject, Trials
from backends.generation.pipeline import load_pipeline
from backends.model_table import read_table
from backends.request import GenerateRequest, LoadRequest
from benchmarks.simulate import simulate
from tests.checkpoints import checkpoint


def loaded(type_name):
    load = LoadRequest(model_type=type_name, checkpoint=str(checkpoint(type_name)), variant="fp32")
    return load_pipeline(read_table()[type_name], load, device=torch.device("cpu"))


def test_survey_of_a_unet_counts_what_its_layers_do():
    pipeline = loaded("sdxl")
    request = GenerateRequest(
        prompt="a cat", height=64, width=64, num_inference_steps=6, guidance_scale=5.0, seed=0
    )
    denoiser = pipeline.pipe.unet
    sizes, handles = [], []
    for name, module in denoiser.named_modules():
        if name.endswith(("attn1.to_k", "attn1.to_v")):
            handles.append(
                module.register_forward_hook(
                    lambda module, given, output: sizes.append(output.nbytes)
                )
            )
    work = Trials(
        PipelineSubject(pipeline, request, request),
        spec=pipeline.spec,
        rank=0,
        world_size=1,
        halves=2,
    ).alone()
    for handle in handles:
        handle.remove()
    modules = list(denoiser.modules())
    layers = {
        "attentions": len(handles) // 2,
        "convolutions": sum(isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1 for m in modules),
    }
    assert (work.num_attentions, work.num_convolutions) == (
        layers["attentions"],
        layers["convolutions"],
    )
    assert work.num_norms == sum(isinstance(module, nn.GroupNorm) for module in modules)
    assert work.kv_bytes == sum(sizes[: len(handles)])
    assert (work.latent_bytes, work.halves) == (2 * 4 * 8 * 8 * 4, 2)
    assert work.weight_bytes == bytes_of(denoiser) and work.other_bytes > 0
    assert work.step_s > 0 and work.skip_bytes > 0 and work.halo_bytes > 0


@pytest.mark.parametrize("type_name", ["sdxl", "sd3", "flux"])
def test_checkpoints_files_tell_the_number_of_weights_and_roughly_what_a_step_sends(type_name):
    pipeline = loaded(type_name)
    spec = pipeline.spec
    denoiser = getattr(pipeline.pipe, spec.denoiser)
    assert count_weights(checkpoint(type_name) / spec.denoiser) == sum(
        tensor.numel() for tensor in denoiser.state_dict().values()
    )
    size = {"height": 128, "width": 128}
    estimate = estimate_checkpoint(
        spec, checkpoint(type_name), variant="fp32", halves=1, device=DEVICES["cpu"], **size
    )
    with surveyed(denoiser) as survey:
        pipeline.generate(
            GenerateRequest(
                prompt="a cat", num_inference_steps=1, guidance_scale=1.0, seed=0, **size
            )
        )
    text = (
        256 / (64 + 256) if spec.denoiser == "transformer" else 0.0
    )  # the estimate assumes a long text
    assert (
        estimate.kv_bytes * (1 - text) < 1.3 * survey.kv_bytes
        and survey.kv_bytes < 4 * estimate.kv_bytes
    )
    assert estimate.num_attentions == pytest.approx(survey.num_attentions, rel=0.25)


def test_weights_of_a_folder_are_counted_once_where_there_are_copies_at_half_precision(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3, 5)}, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file(
        {"weight": torch.zeros(3, 5).half()}, tmp_path / "diffusion_pytorch_model.fp16.safetensors"
    )
    assert count_weights(tmp_path) == 15
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"no header")
    assert count_weights(tmp_path) == 0


def test_simulation_gains_by_links_and_falls_back_where_they_are_slow():
    options = {
        "model": "sdxl",
        "latency_us": 30.0,
        "side": 1024,
        "tflops": 150.0,
        "step_s": None,
        "memory_gb": None,
        "quality": "high",
    }
    result = simulate(argparse.Namespace(ranks="4,16", link_gbps="1,25,900", json=True, **options))
    chosen = {
        (case["ranks"], case["link_gbps"]): case["best"][_ranks(case)] for case in result["cases"]
    }
    for ranks in (4, 16):
        seconds = [chosen[ranks, gbps]["image_s"] for gbps in (1, 25, 900)]
        assert seconds == sorted(seconds, reverse=True) and seconds[0] > seconds[-1]
    assert (
        _ranks(
            next(case for case in result["cases"] if (case["ranks"], case["link_gbps"]) == (16, 1))
        )
        < 16
    )
    assert chosen[16, 900]["speedup"] > chosen[4, 900]["speedup"] > 3
    slow = simulate(
        argparse.Namespace(ranks="4", link_gbps="900", json=True, **{**options, "step_s": 1.0})
    )
    assert (
        slow["one_rank_step_s"] == 1.0
        and slow["cases"][0]["best"][4]["image_s"] > chosen[4, 900]["image_s"]
    )


def _ranks(case):
    return next(size for size, best in case["best"].items() if best["method"] == case["choice"])

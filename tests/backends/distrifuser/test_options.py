"""Patches together with ControlNet, LoRA and torch.compile: the same as one rank with the same
option.
"""

from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)

from tests.backends.distrifuser.driving import (
    PROMPTS,
    arguments,
    assert_same,
    attached,
    build,
    generate,
    load_wide,
)
from tests.backends.reference import from_rank_zero
from tests.checkpoints import controlnet, load, lora, sample_image

BANDS = {"sync_mode": "full_sync", "no_split_batch": True}
WITH_CONTROLNET = {
    "sd1": StableDiffusionControlNetPipeline,
    "sdxl": StableDiffusionXLControlNetPipeline,
}


def load_controlled(name: str, rows: int) -> tuple[Any, dict[str, Any]]:
    """The pipeline with a ControlNet, and the arguments of a short generation with it."""
    pipe = load(name)
    net = ControlNetModel.from_pretrained(controlnet(name), local_files_only=True)
    unused = {"safety_checker": None, "requires_safety_checker": False} if name == "sd1" else {}
    controlled = WITH_CONTROLNET[name](**{**pipe.components, **unused}, controlnet=net).to(
        torch.float64
    )
    controlled.set_progress_bar_config(disable=True)
    given = arguments(name, rows=rows)
    given["image"] = sample_image(64)
    return controlled, given


def check_controlnet(
    rank: int, world_size: int, names: tuple[str, ...], option_sets: tuple[dict[str, Any], ...]
) -> None:
    for name in names:
        pipe, given = load_controlled(name, 8 * max(2, world_size))
        off = from_rank_zero(
            lambda: generate(pipe, None, given | {"controlnet_conditioning_scale": 0.0})
        )
        cases = {
            "guided": given,
            "unguided": given | {"guidance_scale": 1.0},
            "guess mode": given | {"guess_mode": True},
            "two prompts": given
            | {"prompt": list(PROMPTS), "image": [sample_image(64, seed=seed) for seed in (0, 1)]},
        }
        wanted = from_rank_zero(
            lambda: {label: generate(pipe, None, case) for label, case in cases.items()}
        )
        assert float((wanted["guided"] - off).abs().max()) > 1e-2, (
            "the ControlNet should have been visible"
        )
        for options in option_sets:
            with attached(pipe, name, rank, world_size, **options) as backend:
                for label, case in cases.items():
                    got = generate(pipe, backend, case, warmup_steps=case["num_inference_steps"])
                    assert_same(got, wanted[label], f"{name} {options} {label}")
        assert_same(generate(pipe, None, given), wanted["guided"], f"{name} after detach")


@pytest.mark.slow  # tests/backends/test_feature_matrix.py has both features under patches
def test_controlnet_under_bands_and_split_batch_matches_one_rank(run_on_ranks):
    for name in WITH_CONTROLNET:
        controlnet(name)
    run_on_ranks(check_controlnet, 2, ("sdxl",), (BANDS, {"sync_mode": "full_sync"}))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_controlnet_of_every_unet_on_more_ranks_matches_one_rank(run_on_ranks, world_size):
    for name in WITH_CONTROLNET:
        controlnet(name)
    run_on_ranks(
        check_controlnet, world_size, tuple(WITH_CONTROLNET), (BANDS, {}, {"no_split_batch": True})
    )


def check_lora(rank: int, world_size: int) -> None:
    pipe, given = load_wide("sdxl"), arguments("sdxl")
    plain = generate(pipe, None, given)
    pipe.load_lora_weights(lora("sdxl"))
    pipe.to(torch.float64)
    want = generate(pipe, None, given)
    assert float((want - plain).abs().max()) > 1e-2, "the LoRA should have been visible"
    with attached(pipe, "sdxl", rank, world_size, **BANDS) as backend:
        assert_same(generate(pipe, backend, given), want, "loaded before attaching")
        pipe.unload_lora_weights()
        assert_same(generate(pipe, backend, given), plain, "unloaded while attached")
        pipe.load_lora_weights(lora("sdxl"))
        pipe.to(torch.float64)
        assert_same(generate(pipe, backend, given), want, "loaded while attached")


@pytest.mark.slow
def test_lora_loaded_before_or_after_attaching_matches_one_rank(run_on_ranks):
    build(["sdxl"])
    lora("sdxl")
    run_on_ranks(check_lora, 2)


@torch.no_grad()
def check_compiled(rank: int, world_size: int) -> None:
    """The graph holds the collectives; a graph break would be an error."""
    pipe, given = load("sdxl"), arguments("sdxl", steps=1)
    want = generate(pipe, None, given)
    with attached(pipe, "sdxl", rank, world_size, **BANDS) as backend:
        pipe.unet.compile(backend="aot_eager", fullgraph=True)
        assert_same(generate(pipe, backend, given), want, "compiled")
    pipe.unet._compiled_call_impl = None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_unet_matches_one_rank(run_on_ranks):
    build(["sdxl"])
    run_on_ranks(check_compiled, 2)

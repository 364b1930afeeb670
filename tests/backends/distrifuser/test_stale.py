"""Every stale mode equals the one-process simulation of its schedule, and equals one rank while all steps are synchronous."""

from typing import Any

import pytest
import torch
from torch import Tensor

from backends.base import Run
from backends.distrifuser.modes import SYNC_MODES
from backends.request import GenerateRequest
from tests.backends.distrifuser.driving import arguments, assert_same, attached, build, generate
from tests.backends.distrifuser.simulation import Simulation
from tests.checkpoints import load

STALE = tuple(name for name in SYNC_MODES if name != "full_sync")
NUM_STEPS = 5


def unet_inputs(config: Any) -> list[dict[str, Tensor]]:
    """Samples of consecutive steps: each differs a little from the one before, as in sampling."""
    generator = torch.Generator().manual_seed(1)
    num_pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    start, drift = (torch.randn(1, 4, 16, 8, generator=generator) for _ in range(2))
    fixed = {
        "encoder_hidden_states": torch.randn(1, 7, config.cross_attention_dim, generator=generator),
        "text_embeds": torch.randn(1, num_pooled, generator=generator),
        "time_ids": torch.tensor([[128.0, 64, 0, 0, 128, 64]]),
    }
    return [{"sample": start + 0.3 * step * drift, **fixed} for step in range(NUM_STEPS)]


def call_unet(
    unet: Any, sample: Tensor, *, timestep: float, encoder_hidden_states: Tensor, text_embeds: Tensor, time_ids: Tensor
) -> Tensor:
    conditions = {"text_embeds": text_embeds, "time_ids": time_ids}
    given = {"encoder_hidden_states": encoder_hidden_states, "added_cond_kwargs": conditions, "return_dict": False}
    return unet(sample, torch.tensor(timestep), **given)[0]


@torch.no_grad()
def check_unet(rank: int, world_size: int, mode: str, bounds: tuple[int, ...], options: dict[str, Any]) -> None:
    options = {"warm_up_steps": 2, **options}
    unet = load("sdxl").unet
    simulation = Simulation(
        unet,
        mode=SYNC_MODES[mode],
        bounds=bounds,
        synchronous_steps=options["warm_up_steps"],
        attentions=lambda name: name.endswith("attn1"),
        extrapolates=options.get("extrapolate", False),
    )
    want = [
        simulation.run(lambda x, step=step, **rest: call_unet(unet, x, timestep=900.0 - 50 * step, **rest), dim=-2, **given)
        for step, given in enumerate(unet_inputs(unet.config))
    ]
    pipe = load("sdxl")
    with attached(pipe, "sdxl", rank, world_size, sync_mode=mode, no_split_batch=True, **options) as backend:
        for _ in range(2):  # the second generation reuses the buffers of the first
            backend.begin(Run(request=GenerateRequest(), height=128, width=64, num_inference_steps=NUM_STEPS))
            for step, given in enumerate(unet_inputs(unet.config)):
                got = call_unet(pipe.unet, timestep=900.0 - 50 * step, **given)
                assert_same(got, want[step], relative=2e-5)
                backend.step_done()
            backend.end()


@pytest.mark.parametrize("mode", STALE)
def test_stale_unet_equals_the_simulation(run_on_ranks, mode):
    build(["sdxl"])
    run_on_ranks(check_unet, 2, mode, (0, 8, 16), {})


@pytest.mark.parametrize("mode", ["corrected_async_gn", "rotate"])
def test_stale_unet_on_three_uneven_bands_equals_the_simulation(run_on_ranks, mode):
    build(["sdxl"])
    run_on_ranks(check_unet, 3, mode, (0, 8, 12, 16), {})


def test_slower_rank_gets_fewer_rows_and_the_simulation_agrees(run_on_ranks):
    build(["sdxl"])
    run_on_ranks(check_unet, 2, "corrected_async_gn", (0, 12, 16), {"patch_weights": "3,1"})


def test_zero_warmup_steps_still_start_with_a_synchronous_step(run_on_ranks):
    build(["sdxl"])
    run_on_ranks(check_unet, 2, "corrected_async_gn", (0, 8, 16), {"warm_up_steps": 0})


def check_warmup_covers_all(rank: int, world_size: int) -> None:
    pipe = load("sdxl")
    for height in (128, 96):  # a second size in the same process
        given = arguments("sdxl", height=height)
        want = generate(pipe, None, given)
        with attached(pipe, "sdxl", rank, world_size, no_split_batch=True) as backend:
            assert_same(generate(pipe, backend, given, warmup_steps=3), want)
            stale = generate(pipe, backend, given, warmup_steps=1)
            assert float((stale - want).abs().max()) > 1e-4, "with one synchronous step the result should have differed a little"
            assert_same(generate(pipe, backend, given, warmup_steps=3), want)


def test_warmup_of_all_steps_matches_one_rank_before_and_after_a_stale_generation(run_on_ranks):
    build(["sdxl"])
    run_on_ranks(check_warmup_covers_all, 2)

"""Every stale mode equals the one-process simulation of its schedule, and equals one rank while all
steps are synchronous.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.distrifuser.modes import SYNC_MODES
from backends.loading.caches.prediction_cache import PredictionCache
from backends.loading.caches.step_cache import StepCache, attached_cache
from backends.parallel.base import RunInfo
from backends.request import GenerateRequest
from backends.step_cache_spec import StepCacheSpec, parse_step_cache
from tests.backends.distrifuser.driving import (
    arguments,
    assert_same,
    attached,
    build,
    generate,
    load_wide,
    table,
)
from tests.backends.distrifuser.simulation import Simulation
from tests.backends.reference import from_rank_zero

STALE = tuple(name for name in SYNC_MODES if name != "full_sync")
NUM_STEPS = 6  # caches that skip every second one leave enough to extrapolate from
WIDE = {"dtype": torch.float64}


@dataclass(frozen=True, kw_only=True)
class Case:
    """bounds: of the patches that the options are expected to give, in latent rows of a UNet or
    tokens of a transformer.
    """

    mode: str
    bounds: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    step_cache: str = ""


def spec_of(case: Case, name: str) -> StepCacheSpec | None:
    return parse_step_cache(case.step_cache, table()[name]) if case.step_cache else None


@contextmanager
def cached(pipe: Any, name: str, case: Case) -> Iterator[list[StepCache | PredictionCache]]:
    """The case's step cache, if it has one, attached to the pipeline."""
    asked = spec_of(case, name)
    caches = [] if asked is None else [attached_cache(asked, table()[name], pipe)]
    yield caches
    for cache in caches:
        cache.detach()


def samples(*shape: int) -> list[Tensor]:
    """Of consecutive steps: each differs a little from the one before, as in sampling."""
    generator = torch.Generator().manual_seed(1)
    start, drift = (torch.randn(shape, generator=generator, **WIDE) for _ in range(2))
    return [start + 0.3 * step * drift for step in range(NUM_STEPS)]


def timestep_of(step: int) -> Tensor:
    return torch.tensor([900.0 - 50 * step], **WIDE)


def sdxl_call(unet: Any) -> tuple[list[Tensor], Callable[[Tensor, int], Tensor]]:
    config, generator = unet.config, torch.Generator().manual_seed(2)
    num_pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    text = torch.randn(1, 7, config.cross_attention_dim, generator=generator, **WIDE)
    pooled = torch.randn(1, num_pooled, generator=generator, **WIDE)
    sizes = torch.tensor([[128.0, 64, 0, 0, 128, 64]], **WIDE)

    def call(sample: Tensor, step: int) -> Tensor:
        many = len(sample)
        conditions = {"text_embeds": pooled.repeat(many, 1), "time_ids": sizes.repeat(many, 1)}
        given = {
            "encoder_hidden_states": text.repeat(many, 1, 1),
            "added_cond_kwargs": conditions,
            "return_dict": False,
        }
        return unet(sample, timestep_of(step), **given)[0]

    return samples(1, 4, 16, 8), call


def flux_call(transformer: Any) -> tuple[list[Tensor], Callable[[Tensor, int], Tensor]]:
    config, generator = transformer.config, torch.Generator().manual_seed(2)
    text = torch.randn(1, 6, config.joint_attention_dim, generator=generator, **WIDE)
    pooled = torch.randn(1, config.pooled_projection_dim, generator=generator, **WIDE)
    places = torch.stack(
        [torch.zeros(32), torch.arange(32) // 4, torch.arange(32) % 4], dim=1
    ).double()

    def call(sample: Tensor, step: int, tokens: slice = slice(0, 32)) -> Tensor:
        many = len(sample)
        return transformer(
            hidden_states=sample,
            timestep=timestep_of(step).repeat(many) / 1000,
            guidance=torch.full((many,), 3.5, **WIDE),
            encoder_hidden_states=text.repeat(many, 1, 1),
            pooled_projections=pooled.repeat(many, 1),
            img_ids=places[tokens],
            txt_ids=torch.zeros(6, 3, **WIDE),
            return_dict=False,
        )[0]

    return samples(1, 32, config.in_channels), call


def sd3_call(transformer: Any) -> tuple[list[Tensor], Callable[[Tensor, int], Tensor]]:
    config, generator = transformer.config, torch.Generator().manual_seed(2)
    text = torch.randn(1, 6, config.joint_attention_dim, generator=generator, **WIDE)
    pooled = torch.randn(1, config.pooled_projection_dim, generator=generator, **WIDE)

    def call(sample: Tensor, step: int) -> Tensor:
        many = len(sample)
        texts = {
            "encoder_hidden_states": text.repeat(many, 1, 1),
            "pooled_projections": pooled.repeat(many, 1),
        }
        return transformer(
            hidden_states=sample,
            timestep=timestep_of(step).repeat(many),
            **texts,
            return_dict=False,
        )[0]

    return samples(1, config.in_channels, 16, 8), call


CALLS = {"sdxl": sdxl_call, "flux": flux_call, "sd3": sd3_call}
ATTENTIONS = {"sdxl": ".attn1", "flux": ".attn", "sd3": ".attn"}
TEXT = {"sdxl": None, "flux": "first", "sd3": "last"}


def simulated(pipe: Any, name: str, case: Case) -> list[Tensor]:
    network, cache = getattr(pipe, table()[name].denoiser), spec_of(case, name)
    skips_whole_steps = cache is not None and cache.skips_whole_steps
    simulation = Simulation(
        network,
        mode=SYNC_MODES[case.mode],
        bounds=case.bounds,
        synchronous_steps=case.options["warm_up_steps"],
        attentions=lambda module: module.endswith(ATTENTIONS[name]),
        text=TEXT[name],
        extrapolates=case.options.get("extrapolate", case.mode == "corrected_async_gn"),
        step_cache=None if skips_whole_steps else cache,
    )
    inputs, call = CALLS[name](network)
    predictions, computed = [], []
    with cached(pipe, name, replace(case, step_cache="") if skips_whole_steps else case) as caches:
        for each in caches:
            each.begin(is_on=True)
        for step, sample in enumerate(inputs):
            if skips_whole_steps and cache.skips_whole(step, NUM_STEPS):
                older, last = computed[-2:]
                line = (predictions[last] - predictions[older]) / (last - older)
                predictions.append(predictions[last] + (step - last) * line)
                continue
            computed.append(step)
            predictions.append(
                simulation.run(lambda sample, step=step: call(sample, step), sample, dim=-2)
            )
            for each in caches:
                each.step_done(NUM_STEPS)
    simulation.close()
    return predictions


@torch.no_grad()
def check_simulation(rank: int, world_size: int, name: str, cases: tuple[Case, ...]) -> None:
    pipe = load_wide(name)
    network = getattr(pipe, table()[name].denoiser)
    inputs, call = CALLS[name](network)
    exact = from_rank_zero(lambda: [call(sample, step) for step, sample in enumerate(inputs)])
    for case in cases:
        case = Case(
            mode=case.mode,
            bounds=case.bounds,
            options={"warm_up_steps": 2, "no_split_batch": True, **case.options},
        )
        want = from_rank_zero(lambda: simulated(pipe, name, case))
        assert float((want[-1] - exact[-1]).abs().max()) > 1e-6, (
            f"{case}: a stale step should have differed from an exact one"
        )
        with (
            cached(pipe, name, case) as caches,
            attached(pipe, name, rank, world_size, sync_mode=case.mode, **case.options) as backend,
        ):
            sizes = []
            for generation in range(
                2 if case.mode == "corrected_async_gn" else 1
            ):  # the second one reuses the buffers of the first
                backend.begin(
                    RunInfo(
                        request=GenerateRequest(),
                        height=128,
                        width=64,
                        num_inference_steps=NUM_STEPS,
                        step_cache=spec_of(case, name),
                    )
                )
                for cache in caches:
                    cache.begin(is_on=True)
                for step, sample in enumerate(inputs):
                    assert_same(
                        call(sample, step),
                        want[step],
                        f"{name} {case} generation {generation} step {step}",
                    )
                    ran = True
                    for cache in caches:
                        ran = cache.step_done(NUM_STEPS)
                    if ran:
                        backend.step_done()
                backend.end()
                sizes.append(backend.report()["buffer_bytes"])
            assert sizes[0] == sizes[-1] > 0, (
                f"{name} {case}: the second generation should have found the buffers of the first"
            )


def test_stale_unet_on_two_ranks_equals_the_simulation_in_every_mode(run_on_ranks):
    build(["sdxl"])
    cases = [Case(mode=mode, bounds=(0, 8, 16)) for mode in STALE]
    cases += [Case(mode="corrected_async_gn", bounds=(0, 12, 16), options={"patch_weights": "3,1"})]
    cases += [
        Case(mode=mode, bounds=(0, 8, 16), step_cache="deep,2")
        for mode in ("corrected_async_gn", "no_sync")
    ]
    cases += [Case(mode="corrected_async_gn", bounds=(0, 8, 16), step_cache="prediction,2")]
    run_on_ranks(check_simulation, 2, "sdxl", tuple(cases))


@pytest.mark.slow
def test_stale_unet_equals_the_simulation_with_and_without_extrapolation_and_warmup(run_on_ranks):
    build(["sdxl"])
    cases = (
        Case(mode="corrected_async_gn", bounds=(0, 8, 16), options={"extrapolate": False}),
        Case(mode="stale_gn", bounds=(0, 8, 16), options={"extrapolate": True}),
        Case(
            mode="corrected_async_gn", bounds=(0, 8, 16), options={"warm_up_steps": 0}
        ),  # the first step is synchronous all the same
    )
    run_on_ranks(check_simulation, 2, "sdxl", cases)


@pytest.mark.slow
def test_stale_unet_on_three_uneven_bands_equals_the_simulation(run_on_ranks):
    build(["sdxl"])
    cases = tuple(
        Case(mode=mode, bounds=(0, 8, 12, 16)) for mode in ("corrected_async_gn", "rotate")
    )
    run_on_ranks(check_simulation, 3, "sdxl", cases)


@pytest.mark.parametrize("name", ["flux", pytest.param("sd3", marks=pytest.mark.slow)])
def test_stale_transformer_on_two_ranks_equals_the_simulation(run_on_ranks, name):
    build([name])
    cases = [
        Case(mode=mode, bounds=(0, 16, 32)) for mode in ("corrected_async_gn", "no_sync", "rotate")
    ]
    cases += [Case(mode="stale_gn", bounds=(0, 16, 32), options={"extrapolate": True})]
    cases += [Case(mode="corrected_async_gn", bounds=(0, 16, 32), step_cache="taylor,2")]
    if name == "flux":
        cases += [Case(mode="stale_gn", bounds=(0, 20, 32), options={"patch_weights": "5,3"})]
    run_on_ranks(check_simulation, 2, name, tuple(cases))


@pytest.mark.slow
def test_stale_transformer_on_three_ranks_equals_the_simulation(run_on_ranks):
    build(["flux"])
    cases = tuple(
        Case(mode=mode, bounds=(0, 11, 22, 32))
        for mode in ("corrected_async_gn", "no_sync", "rotate")
    )
    run_on_ranks(check_simulation, 3, "flux", cases)


def check_warmup_covers_all(rank: int, world_size: int, name: str, modes: tuple[str, ...]) -> None:
    pipe = load_wide(name)
    given, other = (
        arguments(name, steps=3),
        arguments(name, rows=12, steps=3),
    )  # a second size in the same process
    want, want_other = generate(pipe, None, given), generate(pipe, None, other)
    for mode in modes:
        with attached(pipe, name, rank, world_size, sync_mode=mode, no_split_batch=True) as backend:
            assert_same(generate(pipe, backend, given, warmup_steps=3), want, f"{name} {mode}")
            stale = generate(pipe, backend, given, warmup_steps=1)
            assert float((stale - want).abs().max()) > 1e-5, (
                f"{name} {mode}: one synchronous step should have made a difference"
            )
            assert_same(
                generate(pipe, backend, other, warmup_steps=3),
                want_other,
                f"{name} {mode} after a stale generation",
            )


@pytest.mark.slow
def test_warmup_of_all_steps_matches_one_rank_before_and_after_a_stale_generation(run_on_ranks):
    build(["sdxl"])
    run_on_ranks(check_warmup_covers_all, 2, "sdxl", STALE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["sd1", "sd2", "sdup", "svd", "ad", "flux", "sd3", "pixa", "pixs", "hy"]
)
def test_warmup_of_all_steps_matches_one_rank_for_every_type(run_on_ranks, name):
    build([name])
    run_on_ranks(check_warmup_covers_all, 2, name, ("corrected_async_gn", "rotate"))

"""Windows of steps, starts from latents, own lists of noise levels, progress and cancelling: on
real tiny pipelines of all types.
"""

import numpy as np
import pytest
import torch

from backends.errors import CancelledError
from backends.generation.schedulers import SCHEDULERS, build_scheduler, parse_scheduler
from backends.generation.step_driver import REPLACED, InitialLatents, StepDriver
from backends.generation.step_window import Schedule
from tests.backends import gaussian
from tests.backends.generation.test_schedulers import (
    CONFIGS,
    EPSILON_NAMES,
    FLOW_NAMES,
    STOCHASTIC,
    pipeline,
)
from tests.checkpoints import inputs

FLOW_TYPES = ("sd3", "flux")
SAMPLERS = {
    "hy": "ddim",
    "sd1": "ddim",
    "pixa": "heun",
    "pixs": "euler",
}  # others: the checkpoint's own
TYPES = ("ad", "sd1", "sd2", "sd3", "sdup", "sdxl", "svd", "flux", "hy", "pixa", "pixs")


def generate(
    model_type, schedule, *, scheduler=None, latents=None, noise=None, on_step=None, **arguments
):
    """(latents, driver) of one run from seed 0; `latents` and `noise` make a start."""
    pipe, pristine = pipeline(model_type)
    flow = model_type in FLOW_TYPES
    pipe.scheduler = build_scheduler(
        parse_scheduler(scheduler or SAMPLERS.get(model_type)), pristine, flow=flow
    )
    start = (
        None
        if latents is None
        else InitialLatents(latents=latents, noise=noise, is_scaled_by_pipeline=not flow)
    )
    arguments = (
        inputs(model_type, num_inference_steps=schedule.num_inference_steps)
        | {"output_type": "latent"}
        | arguments
    )
    with StepDriver(
        pipe.scheduler, schedule, start=start, on_step=on_step, generator=arguments["generator"]
    ) as driver:
        result = pipe(latents=driver.latents, **arguments)[0]
    return result, driver


def steps(count, **window):
    return Schedule(num_inference_steps=count, **window)


def scheduler_for(model_type, name=None):
    return build_scheduler(
        parse_scheduler(name), CONFIGS[model_type], flow=model_type in FLOW_TYPES
    )


def samplers(*model_types):
    """(model type, name) of each sampler without noise in its steps that these families of models
    can have.
    """
    names = {True: FLOW_NAMES, False: EPSILON_NAMES}
    return [
        (kind, name)
        for kind in model_types
        for name in names[kind in FLOW_TYPES]
        if name not in STOCHASTIC
    ]


# ---- windows


LATE = ("ad", "sd1", "sd2", "pixs")


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=pytest.mark.slow) if name in LATE else name for name in TYPES],
)
def test_two_halves_make_the_whole_on_every_type(model_type):
    whole, _ = generate(model_type, steps(4))
    half, first = generate(model_type, steps(4, stop_step=2))
    rest, second = generate(model_type, steps(4, first_step=2), latents=half)
    assert (rest - whole).abs().max() < 1e-4 * whole.abs().max()
    assert (half - whole).abs().max() > 1e-3 * whole.abs().max()
    assert first.num_steps + second.num_steps == (7 if model_type == "pixa" else 4)


@pytest.mark.parametrize(("model_type", "name"), samplers("sd1", "sd3"))
def test_two_halves_make_the_whole_with_every_sampler(model_type, name):
    scheduler = scheduler_for(model_type, name)
    half = gaussian.sample(scheduler, 20, stop_step=10).latents
    rest = gaussian.sample(
        scheduler,
        20,
        first_step=10,
        start=InitialLatents(latents=half, is_scaled_by_pipeline=model_type == "sd1"),
    ).latents
    want = gaussian.sample(scheduler, 20).latents
    has_history = SCHEDULERS[name].class_name.startswith(
        ("DPMSolver", "UniPC", "DEIS", "LMS", "PNDM", "IPNDM")
    )
    assert (rest - want).abs().max() < (
        0.06 if has_history else 1e-5
    )  # those start again at first order


@pytest.mark.parametrize("end", [0.3, 0.501, 0.77])
def test_denoising_end_is_that_of_the_sdxl_pipeline(end):
    """0.501 puts the cut on a timestep."""
    pipe, pristine = pipeline("sdxl")
    pipe.scheduler = build_scheduler(parse_scheduler(None), pristine, flow=False)
    native = pipe(
        **inputs("sdxl", num_inference_steps=6) | {"output_type": "latent", "denoising_end": end}
    )[0]
    ours, _ = generate("sdxl", steps(6, denoising_end=end))
    assert torch.equal(ours, native)


def test_denoising_end_of_one_runs_to_the_end():
    assert torch.equal(
        generate("sd1", steps(3, denoising_end=1.0))[0], generate("sd1", steps(3))[0]
    )


@pytest.mark.parametrize(
    ("count", "strength", "first"),
    [
        (10, 1.0, 0),
        (10, 0.9, 1),
        (10, 0.7, 3),
        (20, 0.6, 8),
        (5, 0.9, 0),
        (20, 0.01, 19),
        (7, 0.5, 3),
    ],
)
def test_strength_begins_at_the_step_of_the_rule(count, strength, first):
    starts = list(range(1000, 0, -1000 // count))[:count]
    assert steps(count, strength=strength).window(starts, 1000) == range(first, count)
    assert steps(count, strength=float(np.float32(strength))).window(starts, 1000) == range(
        first, count
    )


def test_second_order_ends_after_a_whole_step():
    run = gaussian.sample(scheduler_for("sd1", "heun"), 10, denoising_end=0.5)
    assert run.num_steps % 2 == 0
    assert run.latents.std() == pytest.approx(
        (gaussian.STD**2 + run.sigmas[-1] ** 2) ** 0.5, rel=0.05
    )


def test_pndm_begins_part_way_with_its_corrected_step():
    run = gaussian.sample(
        scheduler_for("sd1", "pndm"),
        10,
        first_step=4,
        stop_step=8,
        start=InitialLatents(latents=gaussian.noise()),
    )
    assert run.timesteps == [501, 401, 401, 301, 201]


def test_denoising_end_counts_positions_where_timesteps_are_noise_levels():
    whole, part = (
        gaussian.sample(scheduler_for("svd"), 10),
        gaussian.sample(scheduler_for("svd"), 10, denoising_end=0.7),
    )
    assert part.timesteps == whole.timesteps[:7]
    assert whole.timesteps[0] < 2  # such timesteps are all far below the cut at 300


def test_step_numbers_and_fractions_both_bound_the_window():
    window = steps(10, strength=0.8, first_step=4, stop_step=9, denoising_end=0.8).window(
        list(range(1000, 0, -100)), 1000
    )
    assert window == range(4, 9)


# ---- starts


@pytest.mark.parametrize(("model_type", "name"), samplers("sd1", "svd", "sd3"))
def test_noised_start_is_at_the_level_of_its_step(model_type, name):
    is_flow = model_type in FLOW_TYPES
    scheduler = scheduler_for(model_type, name)
    clean, noise = (
        torch.full(gaussian.SHAPE, 0.8),
        torch.randn(gaussian.SHAPE, generator=torch.Generator().manual_seed(5)),
    )
    start = InitialLatents(latents=clean, noise=noise, is_scaled_by_pipeline=not is_flow)
    run = gaussian.sample(scheduler, 30, strength=0.5, start=start)
    want = gaussian.exact(clean, noise, run.sigmas[0], is_flow=is_flow)
    assert (run.latents - want).abs().mean() < 0.04


@pytest.mark.parametrize("model_type", ["sd1", "sdxl", "sd3", "flux", "pixs", "hy"])
def test_less_strength_stays_closer_to_the_input(model_type):
    clean, _ = generate(model_type, steps(2))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    little, much = (
        generate(model_type, steps(6, strength=strength), latents=clean, noise=noise)[0]
        for strength in (0.3, 0.9)
    )
    assert 0 < (little - clean).abs().mean() < 0.8 * (much - clean).abs().mean()


@pytest.mark.parametrize("model_type", ["sd1", "svd", "flux", "sd3"])
def test_full_strength_is_text_to_image(model_type):
    want, driver = generate(model_type, steps(2))
    assert driver.latents is None
    generator = torch.Generator().manual_seed(0)
    if model_type == "svd":
        torch.randn(
            (1, 3, 64, 64), generator=generator
        )  # its noise on the conditioning image comes first
    shape = (1, 16, 8, 8) if model_type == "flux" else want.shape
    noise = torch.randn(shape, generator=generator)
    if model_type == "flux":
        noise = pipeline("flux")[0]._pack_latents(noise, 1, 16, 8, 8)
    got, _ = generate(model_type, steps(2), latents=torch.full(want.shape, 7.0), noise=noise)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_start_leaves_the_given_latents_alone():
    clean, noise = torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8)
    generate("sd1", steps(4, strength=0.5), latents=clean, noise=noise)
    assert (clean == 0).all()
    assert (noise == 1).all()


def test_latents_of_another_dtype_are_refused_where_the_pipeline_takes_them_as_they_are():
    with pytest.raises(
        RuntimeError,
        match=r"copied its initial latents \(torch.float64, cpu\) to torch.float32, cpu",
    ):
        generate(
            "sd3", steps(4, strength=0.5), latents=torch.zeros(1, 16, 8, 8, dtype=torch.float64)
        )


# ---- lists of one's own


@pytest.mark.parametrize(
    "model_type",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("ad", "sdup")),
        "hy",
        "svd",
        "sdxl",
        "sd3",
        "flux",
    ],
)
def test_own_sigmas_are_taken_as_they_are_on_every_pipeline(model_type):
    """The sampler's own list, given back, must change nothing: no second shift, no lost or added
    level.
    """
    want, driver = generate(model_type, steps(4), scheduler="euler")
    sigmas = driver._scheduler.sigmas.tolist()
    got, _ = generate(model_type, steps(99, sigmas=sigmas), scheduler="euler")
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("sd1", "euler"), ("sd1", "ipndm"), ("sd3", "euler"), ("sd3", "unipc"), ("sd3", "fm_lcm")],
)
def test_sigmas_may_end_above_zero_and_go_on_later(model_type, name):
    levels = [1.0, 0.8, 0.6] if model_type == "sd3" else [14.0, 5.0, 2.0]
    run = gaussian.sample(scheduler_for(model_type, name), sigmas=levels)
    assert run.num_steps == 2
    assert run.sigmas == pytest.approx(levels[:-1], rel=2e-3)
    signal = 1 - levels[-1] if model_type == "sd3" else 1.0
    assert float(run.latents.std()) == pytest.approx(
        (signal**2 * gaussian.STD**2 + levels[-1] ** 2) ** 0.5, rel=0.1
    )
    start = InitialLatents(latents=run.latents, is_scaled_by_pipeline=model_type == "sd1")
    rest = gaussian.sample(
        scheduler_for(model_type, name), sigmas=[levels[-1], levels[-1] / 2, 0], start=start
    )
    assert abs(rest.latents.mean() - gaussian.MEAN) < 0.1


def test_own_lists_override_karras():
    run = gaussian.sample(scheduler_for("sd1", "k_euler"), sigmas=[10.0, 5.0, 1.0, 0.0])
    assert run.sigmas == pytest.approx([10, 5, 1], rel=1e-3)
    assert gaussian.sample(
        scheduler_for("sd1", "k_dpmpp_2m"), timesteps=[900, 500, 100]
    ).timesteps == [900, 500, 100]


@pytest.mark.parametrize(
    "name", [name for name, facts in SCHEDULERS.items() if facts.takes_timesteps]
)
def test_own_timesteps_are_those_the_denoiser_sees(name):
    given = [1000 if SCHEDULERS[name].flow else 999, 799, 599, 399, 199]
    run = gaussian.sample(
        scheduler_for("sd3" if SCHEDULERS[name].flow else "sd1", name), timesteps=given
    )
    assert sorted(set(run.timesteps), reverse=True) == pytest.approx(given)
    assert torch.isfinite(run.latents).all()


@pytest.mark.parametrize("name", [None, "fm_heun"])
def test_dynamic_shift_follows_the_resolution_with_every_flow_sampler(name):
    near, far = (
        gaussian.sample(scheduler_for("flux", name), 10, mu=mu).sigmas for mu in (0.5, 1.15)
    )
    shift = np.exp(1.15) / np.exp(0.5)  # sigma / (1 - sigma) of the two differ by this factor
    ratios = [b / (1 - b) / (a / (1 - a)) for a, b in zip(near[1:9], far[1:9], strict=True)]
    assert ratios == pytest.approx([shift] * 8, rel=0.02)


# ---- progress, cancelling, what is left behind


@pytest.mark.parametrize(
    ("scheduler", "window", "calls"),
    [
        ("euler", {}, 6),
        ("heun", {}, 11),
        ("heun", {"strength": 0.5}, 5),
        ("heun", {"denoising_end": 0.5}, 4),
        ("pndm", {}, 7),
        ("pndm", {"strength": 0.5}, 4),
        ("pndm", {"first_step": 5}, 1),
    ],
)
def test_every_scheduler_step_is_reported_in_order(scheduler, window, calls):
    seen = []
    start = {"latents": torch.zeros(1, 4, 8, 8), "noise": torch.ones(1, 4, 8, 8)}
    result, driver = generate(
        "sd1",
        steps(6, **window),
        scheduler=scheduler,
        on_step=lambda index, count, sample: seen.append((index, count, sample)),
        **start,
    )
    assert [(index, count) for index, count, _ in seen] == [
        (index, calls) for index in range(calls)
    ]
    assert driver.num_steps == calls
    assert torch.equal(seen[-1][2], result)


@pytest.mark.parametrize("model_type", ["sdup", "svd", "pixa", "sd1", "flux", "ad"])
def test_exception_in_on_step_stops_the_pipeline_and_leaves_nothing(model_type):
    def cancel(index, count, sample):
        if index == 1:
            raise CancelledError("stop")

    with pytest.raises(CancelledError):
        generate(model_type, steps(4), on_step=cancel)
    scheduler = pipeline(model_type)[0].scheduler
    assert not set(REPLACED) & set(vars(scheduler))
    assert all(
        getattr(scheduler, name).__func__ is getattr(type(scheduler), name)
        for name in REPLACED
        if hasattr(scheduler, name)
    )
    assert torch.isfinite(generate(model_type, steps(1))[0]).all()


def test_driven_run_equals_the_plain_pipeline():
    pipe, pristine = pipeline("sd1")
    for name in ("pndm", "heun", "dpmpp_2m", "unipc"):
        pipe.scheduler = build_scheduler(parse_scheduler(name), pristine, flow=False)
        plain = pipe(**inputs("sd1", num_inference_steps=4) | {"output_type": "latent"})[0]
        assert torch.equal(generate("sd1", steps(4), scheduler=name)[0], plain)


def test_pipeline_still_finds_the_arguments_of_step():
    """`eta` is passed only to a scheduler whose step has it in its signature."""
    calm, stochastic = (
        generate("sd1", steps(3), scheduler="ddim", eta=eta)[0] for eta in (0.0, 1.0)
    )
    assert not torch.equal(calm, stochastic)


def test_pixart_alpha_runs_a_single_step():
    assert torch.isfinite(generate("pixa", steps(1), scheduler="dpmpp_2m")[0]).all()


def test_scheduler_cannot_be_driven_twice_at_once():
    scheduler = scheduler_for("sd1", "euler")
    with StepDriver(scheduler, steps(2)), pytest.raises(RuntimeError, match="already has a driver"):
        StepDriver(scheduler, steps(2)).__enter__()


def scheduler_of(name, model_type):
    return build_scheduler(
        parse_scheduler(name), pipeline(model_type)[1], flow=model_type in FLOW_TYPES
    )


@pytest.mark.parametrize("model_type", ["sd1", "sd2"])
@pytest.mark.parametrize("name", EPSILON_NAMES)
def test_denoised_is_what_the_last_prediction_means(name, model_type):
    """At every step, whatever the sampler's own scaling and the kind of prediction."""
    run = gaussian.sample(scheduler_of(name, model_type), 8)
    assert len(run.denoised) == run.num_steps
    for found, wanted in zip(run.denoised, run.clean, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", FLOW_NAMES)
def test_denoised_is_what_the_last_prediction_of_a_flow_means(name):
    run = gaussian.sample(scheduler_of(name, "sd3"), 8)
    for found, wanted in zip(run.denoised, run.clean, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)

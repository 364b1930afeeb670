"""Schedulers by name: what is read, what is built, what is refused."""

import copy
import functools
import inspect
import logging

import diffusers
import pytest
import torch

from backends.files.component_classes import settings_of
from backends.generation import schedulers
from backends.generation.schedulers import (
    SCHEDULERS,
    SampledModel,
    SchedulerError,
    build_scheduler,
    parse_scheduler,
    require_effect,
    require_sampler,
)
from backends.generation.step_driver import StepDriver
from backends.generation.step_window import Schedule
from tests.backends import gaussian
from tests.checkpoints import inputs, load

EPSILON_NAMES = [name for name, facts in SCHEDULERS.items() if not facts.flow]
FLOW_NAMES = [
    name for name, facts in SCHEDULERS.items() if facts.flow or facts.flow_name or facts.flow_solver
]
STOCHASTIC = {"ddpm", "dpm_2_a", "dpm_sde", "dpmpp_2m_sde", "euler_a", "lcm", "fm_lcm", "tcd"}
STEPS = 3
SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "num_train_timesteps": 1000,
}
SD_CLIP = SD | {"set_alpha_to_one": False, "clip_sample": False}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
CONFIGS = {
    "sd1": SD_CLIP | {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
    "sd2": SD_CLIP | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    "svd": SD
    | {
        "_class_name": "EulerDiscreteScheduler",
        "prediction_type": "v_prediction",
        "timestep_type": "continuous",
    }
    | {
        "timestep_spacing": "leading",
        "sigma_min": 0.002,
        "sigma_max": 700.0,
        "use_karras_sigmas": True,
    },
    "sd3": FLOW | {"shift": 3.0},
    "flux": FLOW | {"shift": 3.0, "use_dynamic_shifting": True},
    "schnell": FLOW | {"shift": 1.0, "use_dynamic_shifting": False},
}


@functools.cache
def pipeline(model_type):
    """(pipeline, its scheduler's config as loaded), shared by all tests, which set the scheduler
    before each run.
    """
    pipe = load(model_type)
    return pipe, dict(pipe.scheduler.config)


def built(value, model_type):
    return build_scheduler(
        parse_scheduler(value),
        CONFIGS[model_type],
        flow="Flow" in CONFIGS[model_type]["_class_name"],
    )


def generate(model_type, name, *, steps=STEPS):
    """(latents, scheduler steps, scheduler) of a run of `name` on the tiny pipeline, from seed
    0.
    """
    pipe, pristine = pipeline(model_type)
    pipe.scheduler = scheduler = build_scheduler(
        parse_scheduler(name), pristine, flow=model_type in ("sd3", "flux")
    )
    arguments = inputs(model_type, num_inference_steps=steps) | {"output_type": "latent"}
    with StepDriver(
        scheduler, Schedule(num_inference_steps=steps), generator=arguments["generator"]
    ) as driver:
        latents = pipe(**arguments)[0]
    return latents, driver.num_steps, scheduler


@pytest.mark.parametrize("name", EPSILON_NAMES)
def test_every_name_runs_on_an_epsilon_model(name):
    latents, calls, scheduler = generate("sd1", name)
    assert type(scheduler).__name__ == SCHEDULERS[name].class_name
    assert calls == {1: STEPS, 2: 2 * STEPS - 1}[scheduler.order] + (name == "pndm")
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize("model_type", ["sd3", "flux"])
@pytest.mark.parametrize("name", FLOW_NAMES)
def test_names_run_on_flow_matching_models(name, model_type):
    latents, calls, scheduler = generate(model_type, name)
    assert calls == {1: STEPS, 2: 2 * STEPS - 1}[scheduler.order]
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("euler", "FlowMatchEulerDiscreteScheduler"),
        ("heun", "FlowMatchHeunDiscreteScheduler"),
        ("lcm", "FlowMatchLCMScheduler"),
    ],
)
def test_flow_matching_models_get_the_counterpart(name, class_name):
    assert type(built(name, "sd3")).__name__ == class_name


@pytest.mark.parametrize(("model_type", "prefix"), [("sd1", "k_"), ("sd2", ""), ("svd", "")])
@pytest.mark.parametrize("name", [name for name in EPSILON_NAMES if name not in STOCHASTIC])
def test_sampler_ends_where_the_equation_does(name, model_type, prefix):
    scheduler = built(prefix + name, model_type)
    run = gaussian.sample(scheduler)
    assert (
        run.latents - gaussian.exact(0, gaussian.noise(), 100, is_flow=False)
    ).abs().mean() < 0.045
    assert (run.timesteps[0] < 2) == (
        model_type == "svd"
    )  # svd's denoiser counts ln(sigma) / 4, whatever the sampler counts


def test_ipndm_comes_closer_than_euler():
    want = gaussian.exact(0, gaussian.noise(), 100, is_flow=False)
    ipndm, euler = (
        (gaussian.sample(built(name, "sd2")).latents - want).abs().mean()
        for name in ("ipndm", "euler")
    )
    assert ipndm < 0.5 * euler


@pytest.mark.parametrize("prefix", ["", "k_"])
@pytest.mark.parametrize(("model_type", "mu"), [("sd3", None), ("flux", 1.0), ("schnell", 1.0)])
@pytest.mark.parametrize("name", [name for name in FLOW_NAMES if name not in STOCHASTIC])
def test_flow_sampler_ends_where_the_equation_does(name, model_type, mu, prefix):
    scheduler = built(prefix + name, model_type)
    assert gaussian.samples_flow(scheduler)
    want = gaussian.exact(0, gaussian.noise(), 1, is_flow=True)
    assert (gaussian.sample(scheduler, mu=mu).latents - want).abs().mean() < 0.045


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_stochastic_sampler_draws_the_right_distribution(name):
    model_type = "sd3" if SCHEDULERS[name].flow else "sd1"
    scheduler = built(name, model_type)
    latents = gaussian.sample(scheduler).latents
    assert abs(latents.mean() - gaussian.MEAN) < 0.05
    assert abs(latents.std() - gaussian.STD) < (
        0.14 if "lcm" in name else 0.08
    )  # LCM takes the mean of what it could be


@pytest.mark.parametrize("name", ["ddim", "euler_a", "heun", "dpmpp_2m"])
def test_other_classes_run_on_svd(name):
    assert torch.isfinite(generate("svd", name, steps=2)[0]).all()


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("sd1", "dpm_sde"), ("sd1", "euler_a"), ("svd", "euler_a"), ("flux", "fm_lcm")],
)
def test_same_seed_same_latents_with_noise_in_every_step(model_type, name):
    once, again = (generate(model_type, name, steps=2)[0] for _ in range(2))
    assert torch.equal(once, again)


def test_no_name_keeps_the_class_and_its_settings():
    scheduler = built({"timestep_spacing": "trailing"}, "svd")
    assert type(scheduler).__name__ == "EulerDiscreteScheduler"
    assert (scheduler.config.sigma_max, scheduler.config.use_karras_sigmas) == (700.0, True)
    assert scheduler.config.timestep_spacing == "trailing"


def test_builds_from_a_scheduler_as_from_its_config():
    own = diffusers.EulerDiscreteScheduler(beta_end=0.012)
    assert build_scheduler(parse_scheduler("ddim"), own, flow=False).config.beta_end == 0.012


def test_settings_do_not_leak_into_the_next_scheduler():
    before = copy.deepcopy(CONFIGS["sd1"])
    changed = built({"scheduler": "k_euler", "beta_end": 0.5}, "sd1")
    next_one = built("euler", "sd1")
    assert (changed.config.beta_end, changed.config.use_karras_sigmas) == (0.5, True)
    assert (next_one.config.beta_end, next_one.config.use_karras_sigmas) == (0.012, False)
    assert CONFIGS["sd1"] == before


def test_a_flag_asked_for_replaces_the_flag_of_the_checkpoint():
    scheduler = built({"use_exponential_sigmas": True}, "svd")
    assert (scheduler.config.use_exponential_sigmas, scheduler.config.use_karras_sigmas) == (
        True,
        False,
    )


def test_latents_are_not_clipped_like_pixels():
    config = SD | {"_class_name": "DPMSolverMultistepScheduler"}
    assert build_scheduler(parse_scheduler("ddim"), config, flow=False).config.clip_sample is False


def test_defaults_of_the_old_class_do_not_reach_another():
    own = diffusers.PNDMScheduler(
        beta_end=0.012
    )  # its default spacing is "leading", Euler's "linspace"
    chosen = diffusers.PNDMScheduler(beta_end=0.012, timestep_spacing="leading")
    spacings = [
        build_scheduler(parse_scheduler("euler"), old, flow=False).config.timestep_spacing
        for old in (own, chosen)
    ]
    assert spacings == ["linspace", "leading"]


def test_noise_levels_of_the_old_class_reach_another_though_they_are_its_defaults():
    own = diffusers.LCMScheduler()
    other = build_scheduler(parse_scheduler("euler"), own, flow=False)
    torch.testing.assert_close(other.alphas_cumprod, own.alphas_cumprod)


@pytest.mark.parametrize("shift", [1.0, 3.0], ids=["5B", "2B"])
@pytest.mark.parametrize("own", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_a_shifted_schedule_reaches_another_class(own, shift):
    """The noise levels of CogVideoX, which has a setting that no other class knows."""
    config = SD_CLIP | {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "snr_shift_scale": shift,
    }
    # a saved scheduler says clip_sample=true, its default, which these classes never read
    pristine = getattr(diffusers, own)(**config | {"clip_sample": True})
    for name in ("ddim", "euler", "dpmpp_2m"):
        other = build_scheduler(parse_scheduler(name), pristine, flow=False)
        torch.testing.assert_close(
            other.alphas_cumprod[:-1].double(), pristine.alphas_cumprod[:-1], atol=1e-5, rtol=1e-3
        )
        assert not other.config.get("clip_sample")
    expected, found = (
        _denoise(scheduler, steps=5)
        for scheduler in (
            diffusers.CogVideoXDDIMScheduler(**config),
            build_scheduler(parse_scheduler("ddim"), pristine, flow=False),
        )
    )
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


ZERO_SNR = SD_CLIP | {
    "_class_name": "EulerDiscreteScheduler",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
"""As NoobAI's v-prediction models have it."""


@pytest.mark.parametrize("name", EPSILON_NAMES)
def test_noise_levels_without_signal_at_the_end_reach_every_class(name):
    """Half of the classes lack rescale_betas_zero_snr. They are given the levels themselves."""
    levels = build_scheduler(parse_scheduler(None), ZERO_SNR, flow=False).alphas_cumprod
    built_ = build_scheduler(parse_scheduler(name), ZERO_SNR, flow=False)
    torch.testing.assert_close(built_.alphas_cumprod[:-1], levels[:-1], atol=1e-6, rtol=1e-3)
    assert built_.alphas_cumprod[-1] < 1e-6
    if name not in STOCHASTIC and built_.alphas_cumprod[-1] > 0:
        want = gaussian.exact(0, gaussian.noise(), 100, is_flow=False)
        assert (gaussian.sample(built_, 40).latents - want).abs().mean() < 0.06


def test_a_request_for_rescaled_levels_reaches_a_class_without_the_setting(caplog):
    asked = {"scheduler": "heun", "rescale_betas_zero_snr": True}
    with caplog.at_level(logging.WARNING):
        assert built(asked, "sd1").alphas_cumprod[-1] < 1e-6
        assert built(asked | {"rescale_betas_zero_snr": False}, "sd1").alphas_cumprod[-1] > 1e-3
    assert "ignored" not in caplog.text


@pytest.mark.parametrize("name", ["euler", "heun", "lcm", "dpmpp_2m", "unipc"])
def test_shift_of_a_flow_model_reaches_a_class_with_another_name_for_it(name):
    wan = {
        "_class_name": "UniPCMultistepScheduler",
        "flow_shift": 5.0,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
    }
    scheduler = build_scheduler(parse_scheduler(name), wan, flow=True)
    scheduler.set_timesteps(10)
    middle = float(scheduler.timesteps[len(scheduler.timesteps) // 2])
    assert middle > 750  # 500 without the shift


@pytest.mark.parametrize("name", ["unipc", "dpmpp_2m", "heun"])
def test_refuses_a_class_that_cannot_count_backwards(name):
    mochi = FLOW | {"invert_sigmas": True}
    with pytest.raises(
        SchedulerError, match=r"count backwards .* Allowed .*: euler, lcm, fm_euler"
    ):
        build_scheduler(parse_scheduler(name), mochi, flow=True)
    assert build_scheduler(parse_scheduler("euler"), mochi, flow=True).config.invert_sigmas


def _denoise(scheduler, *, steps):
    """Return what is left of fixed noise after all steps of a fixed, smooth prediction."""
    scheduler.set_timesteps(steps)
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(torch.sin(3 * scaled), timestep, sample).prev_sample
    return sample


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "fm_euler"])
@pytest.mark.parametrize(
    "own",
    [
        "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler",
        "SCMScheduler",
        "UnCLIPScheduler",
        "HeliosScheduler",
        "CosineDPMSolverMultistepScheduler",
        "DDPMWuerstchenScheduler",
        "CMStochasticIterativeScheduler",
    ],
)
def test_refuses_another_class_where_it_cannot_know_the_model(own, name):
    pristine = getattr(diffusers, own)()
    for flow in (False, True):
        with pytest.raises(
            SchedulerError, match=f"{name}.* cannot sample this model: its own {own}"
        ):
            build_scheduler(parse_scheduler(name), pristine, flow=flow)
    kept = build_scheduler(parse_scheduler(None), pristine, flow=False)
    assert type(kept) is type(pristine)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_settings_are_those_of_the_class(name):
    facts = SCHEDULERS[name]
    own = inspect.signature(schedulers._class(facts.module, facts.class_name).__init__).parameters
    assert settings_of(facts.settings_of or facts.class_name) == set(own) - {"self"}


@pytest.mark.parametrize(
    ("value", "flow", "message"),
    [
        (
            "k_ddim",
            False,
            "use_karras_sigmas has no effect with ddim.*one that has it: deis",
        ),
        ({"scheduler": "euler", "solver_order": 3}, False, "solver_order has no effect with euler"),
        ({"scheduler": "dpmpp_sde", "timestep_spacing": "trailing"}, False, "timestep_spacing has"),
        ({"shift": 5.0}, False, "shift has no effect with this model. Leave it out."),
        ("k_dpmpp_2m", True, "use_karras_sigmas has no effect with dpmpp_2m and this model"),
        ({"rescale_betas_zero_snr": True}, True, "rescale_betas_zero_snr has no effect"),
        ("k_ddim", True, "'ddim' cannot sample a flow-matching model"),
        ("k_dpmpp_2m", False, None),
        ({"scheduler": "heun", "rescale_betas_zero_snr": True}, False, None),
        ({"scheduler": "euler", "shift": 5.0}, True, None),
        ({"use_karras_sigmas": True}, False, None),
    ],
)
def test_settings_without_effect_are_refused_by_name(value, flow, message):
    choice, model = parse_scheduler(value), SampledModel(flow=flow)
    if message is None:
        require_sampler(choice, model)
        require_effect(choice, model)
    else:
        with pytest.raises(SchedulerError, match=message):
            require_sampler(choice, model)
            require_effect(choice, model)


@pytest.mark.parametrize(
    ("settings", "own", "message"),
    [
        ({"use_karras_sigmas": True}, CONFIGS["sd1"], "use_karras_sigmas .* own PNDMScheduler"),
        ({"use_karras_sigmas": True}, CONFIGS["sd2"], "use_karras.* own DDIMScheduler.*: deis"),
        ({"use_karras_sigmas": True}, CONFIGS["svd"], None),
        ({"timestep_spacing": "trailing"}, CONFIGS["sd1"], None),
        ({"rescale_betas_zero_snr": True}, CONFIGS["sd1"], None),
        ({"use_karras_sigmas": True}, CONFIGS["sd3"], None),
        ({"solver_order": 3}, CONFIGS["sd3"], "own FlowMatchEuler.*that has it: dpmpp_2m"),
        (
            {"use_karras_sigmas": True},
            {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
            "use_karras_sigmas has no effect with this model's own DPMSolverMultistepScheduler",
        ),
    ],
)
def test_settings_alone_are_those_of_the_checkpoints_own_sampler(settings, own, message):
    flow = "Flow" in own["_class_name"] or "use_flow_sigmas" in own
    model, choice = SampledModel(flow=flow, own=own), parse_scheduler(settings)
    if message is None:
        require_effect(choice, model)
    else:
        with pytest.raises(SchedulerError, match=message):
            require_effect(choice, model)


def test_curves_of_other_models_do_not_reach_flow_sigmas_of_the_checkpoints_own_sampler():
    own = {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}
    own |= {"prediction_type": "flow_prediction"}
    scheduler = build_scheduler(parse_scheduler({"use_karras_sigmas": True}), own, flow=True)
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.max() <= 1


WITH_OWN_SIGMAS = {"euler", "lcm", "unipc", "fm_euler", "fm_lcm"}


@pytest.mark.parametrize(
    ("pipeline", "own", "names"),
    [
        ("Krea2Pipeline", {}, WITH_OWN_SIGMAS),
        ("HunyuanVideoPipeline", {}, WITH_OWN_SIGMAS),
        ("LTXPipeline", {}, WITH_OWN_SIGMAS),
        ("LTX2ImageToVideoPipeline", {}, WITH_OWN_SIGMAS),
        ("MochiPipeline", {"invert_sigmas": True}, WITH_OWN_SIGMAS - {"unipc"}),
        ("ErnieImagePipeline", {}, WITH_OWN_SIGMAS),  # by set_timesteps itself
        ("SanaPipeline", {}, set(FLOW_NAMES)),  # only a request could bring sigmas
        ("WanVACEPipeline", {}, set(FLOW_NAMES)),
        ("OvisImagePipeline", {}, set(FLOW_NAMES) - {"heun", "fm_heun"}),  # none to flow sigmas
        ("", {}, set(FLOW_NAMES)),
    ],
)
def test_refuses_a_sampler_that_does_not_take_what_the_class_gives_it(pipeline, own, names):
    model = SampledModel(flow=True, own=FLOW | own, pipeline=pipeline)
    assert set(model.samplers) == names
    for name in set(SCHEDULERS) - names:
        with pytest.raises(SchedulerError) as refused:
            require_sampler(parse_scheduler(name), model)
        assert f"scheduler={name!r} " in str(refused.value)
        assert str(refused.value).endswith(f"Allowed for this model: {', '.join(model.samplers)}.")


def test_settings_of_one_solver_do_not_reach_another():
    config = SD | {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "sde-dpmsolver++",
    }
    assert (
        build_scheduler(parse_scheduler("deis"), config, flow=False).config.algorithm_type == "deis"
    )


def test_setting_that_the_class_lacks_is_ignored_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        built("k_ddim", "sd1")
    assert "not for DDIMScheduler with this model: use_karras_sigmas" in caplog.text

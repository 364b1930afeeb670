"""What a request may change of a scheduler: every value that is allowed gives finite latents, and
everything else is refused.
"""

import importlib
import inspect
import itertools
import random
from typing import get_args

import pytest
import torch

from backends.generation.scheduler_settings import (
    OF_OPERATORS,
    OF_REQUESTS,
    LaunchSettings,
    RequestedSettings,
)
from backends.generation.schedulers import (
    SCHEDULERS,
    SampledModel,
    SchedulerError,
    build_scheduler,
    choose_scheduler,
    parse_at_launch,
    parse_requested,
    parse_scheduler,
)
from tests.backends import gaussian
from tests.backends.generation.test_schedulers import CONFIGS, EPSILON_NAMES, FLOW_NAMES

EXTREMES = {
    "steps_offset": (0, 1), "solver_order": (1, 2, 3),
    "disable_corrector": ([], [0, 1, 2], list(range(1000))), "shift": (0.01, 3, 100),
    "flow_shift": (0.01, 3, 100), "base_shift": (0, 10), "max_shift": (0, 10),
}  # fmt: skip


def values(name):
    """Those that matter."""
    kinds = get_args(RequestedSettings.model_fields[name].annotation)
    if bool in kinds:
        return True, False
    return EXTREMES.get(name) or next(get_args(kind) for kind in kinds if get_args(kind))


SINGLE = [{name: value} for name in OF_REQUESTS for value in values(name)]
PAIRS = random.Random(5).sample(
    [a | b for a, b in itertools.combinations(SINGLE, 2) if not a.keys() & b.keys()], 60
)


def run(model_type, name, settings):
    """Refused, or finite."""
    is_flow = "Flow" in CONFIGS[model_type]["_class_name"]
    try:
        scheduler = build_scheduler(
            parse_requested({"scheduler": name, **settings}), CONFIGS[model_type], flow=is_flow
        )
        latents = gaussian.sample(scheduler, 3, mu=1.0 if model_type == "flux" else None).latents
    except SchedulerError:
        return
    assert torch.isfinite(latents).all(), (model_type, name, settings)


def test_every_setting_of_every_scheduler_is_known():
    classes = [
        getattr(importlib.import_module(facts.module), facts.class_name)
        for facts in SCHEDULERS.values()
    ]
    found = {
        name
        for one in classes
        for name in inspect.signature(one.__init__).parameters
        if name != "self"
    }
    assert found == {*OF_REQUESTS, *OF_OPERATORS}


@pytest.mark.parametrize("settings", SINGLE, ids=lambda settings: f"{settings}"[:40])
def test_every_value_that_is_allowed_gives_finite_latents(settings):
    for model_type, names in (("sd1", EPSILON_NAMES), ("sd3", FLOW_NAMES), ("flux", FLOW_NAMES)):
        for name in (None, *names):
            run(model_type, name, settings)


@pytest.mark.slow
@pytest.mark.parametrize("settings", PAIRS, ids=lambda settings: f"{settings}"[:60])
def test_two_values_that_are_allowed_give_finite_latents(settings):
    for model_type, names in (("sd1", EPSILON_NAMES), ("sd3", FLOW_NAMES)):
        for name in (None, *names):
            run(model_type, name, settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"num_train_timesteps": 10**8},
            "num_train_timesteps is not for requests: it belongs to the model",
        ),
        ({"trained_betas": [0.1]}, "trained_betas is not for requests"),
        (
            {"solver_order": 10**8},
            "solver_order=100000000 is not allowed: Input should be less than or equal to 3",
        ),
        ({"shift": float("nan")}, "shift=nan is not allowed"),
        ({"shift": float("inf")}, "shift=inf is not allowed"),
        ({"shift": "3"}, "shift='3' is not allowed"),
        ({"shift": True}, "shift=True is not allowed"),
        ({"steps_offset": 0.5}, "steps_offset=0.5 is not allowed"),
        ({"steps_offset": [1]}, r"steps_offset=\[1\] is not allowed"),
        ({"set_alpha_to_one": 1}, "set_alpha_to_one=1 is not allowed"),
        ({"algorithm_type": {"a": 1}}, "algorithm_type={'a': 1} is not allowed"),
        ({"disable_corrector": [0] * 1001}, "disable_corrector=.* is not allowed"),
        ({"disable_corrector": ["x"]}, "disable_corrector='x' is not allowed"),
        (
            {"use_karas_sigmas": True},
            "'use_karas_sigmas' is not a setting of any scheduler. Did you mean "
            "'use_karras_sigmas'",
        ),
        ({"name": "euler"}, "'name' is not a setting of any scheduler. Leave it out"),
        ({"num_train_timestep": 5}, "Did you mean 'num_train_timesteps'"),
        ({"a" * 5000: 1}, "'a{80}' is not a setting of any scheduler"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refuses_what_is_not_for_requests(settings, said):
    with pytest.raises(SchedulerError, match=said):
        parse_requested({"scheduler": "euler", **settings})


def test_launch_arguments_may_say_what_requests_may_not_but_not_what_nobody_has():
    at_launch = {"scheduler": "ddim", "num_train_timesteps": 500}
    assert choose_scheduler(None, at_launch).overrides == {"num_train_timesteps": 500}
    assert choose_scheduler("euler", at_launch).overrides == {}
    with pytest.raises(SchedulerError, match="Did you mean 'beta_start'"):
        parse_scheduler({"beta_strat": 0.1})


def values_at_launch(name):
    """Of each setting: the words that are allowed, or numbers at its ends."""
    kinds = get_args(LaunchSettings.model_fields[name].annotation)
    words = [value for kind in kinds for value in get_args(kind) if isinstance(value, str)]
    return words or (True, 0, 1, 2, 100, 0.5, 1e6, [0.5] * 3, [0, 1])


def names_with(setting, names):
    """Samplers whose class has the setting."""
    for name in names:
        facts = SCHEDULERS[name]
        made = getattr(importlib.import_module(facts.module), facts.class_name)
        if setting in inspect.signature(made.__init__).parameters:
            yield name


READS_THE_CHECKPOINT = "rescale_betas_zero_snr"
"""Whether it gives an image depends on the checkpoint's own settings."""


@pytest.mark.parametrize("setting", sorted({*OF_REQUESTS, *OF_OPERATORS} - {READS_THE_CHECKPOINT}))
def test_what_the_launcher_lets_through_can_be_built(setting):
    """--check imports no diffusers, and finds what loading would refuse."""
    allowed = 0
    for model_type, names in (("sd1", EPSILON_NAMES), ("sd3", FLOW_NAMES)):
        is_flow = model_type == "sd3"
        tried = itertools.product(names_with(setting, names), values_at_launch(setting))
        for name, value in tried:
            try:
                choice = parse_at_launch(
                    {"scheduler": name, setting: value}, SampledModel(flow=is_flow)
                )
            except SchedulerError as error:
                assert setting in str(error)
                continue
            build_scheduler(choice, CONFIGS[model_type], flow=is_flow)
            allowed += 1
    assert allowed or setting == "solver_p"

"""What is known of a schedule before any rank sees it agrees with diffusers' own schedulers."""

from dataclasses import replace
from itertools import product
from types import MappingProxyType

import pytest

from backends.errors import RequestError
from backends.files.call_rules import first_step_of
from backends.generation.possible_steps import SPACED, highest_starts, require_own_steps
from backends.generation.schedulers import SCHEDULERS, build_scheduler, parse_scheduler
from backends.generation.step_window import Schedule
from backends.model_table import read_table
from backends.request import GenerateRequest
from tests.backends.generation.test_schedulers import CONFIGS

OWN = MappingProxyType(CONFIGS["sd1"])
SPEC = replace(read_table()["sd1"], sampler=OWN)
NAMES = [name for name, facts in SCHEDULERS.items() if not (facts.flow or facts.needs)]
WINDOWS = [
    {"strength": strength, "denoising_end": end}
    for strength, end in product((1.0, 0.5, 0.05), (1e-4, 0.02, 0.3, 0.6, 0.999))
]


def is_refused(schedule, starts, last):
    try:
        schedule.window(starts, last)
    except RequestError:
        return True
    return False


@pytest.mark.parametrize("name", [name for name in NAMES if name != "pndm"])
def test_what_is_refused_leaves_no_step_with_the_real_scheduler(name):
    found = 0
    for spacing, flag in product(
        ("leading", "linspace", "trailing", None), ("use_karras_sigmas", None)
    ):
        asked = {"scheduler": name}
        asked |= {"timestep_spacing": spacing} if spacing else {}
        asked |= {flag: True} if flag else {}
        choice = parse_scheduler(asked)
        scheduler = build_scheduler(choice, CONFIGS["sd1"], flow=False)
        for number in (1, 2, 3, 7, 20):
            scheduler.set_timesteps(number)
            real = scheduler.timesteps[:: getattr(scheduler, "order", 1)].tolist()
            for window in WINDOWS:
                schedule = Schedule(num_inference_steps=number, **window)
                is_ours = is_refused(schedule, *highest_starts(schedule, choice, SPEC))
                is_theirs = is_refused(schedule, real, 1000)
                found += is_ours
                told = (asked, number, window, real[:3])
                assert is_theirs or not is_ours, told
                if spacing and not flag and SCHEDULERS[name].class_name in SPACED:
                    assert is_ours == is_theirs, told
    assert found


def test_a_class_that_starts_from_an_image_says_its_first_step():
    for name, strength, first in (
        ("StableDiffusionXLPAGImg2ImgPipeline", 0.5, 2),
        ("StableDiffusionXLPAGImg2ImgPipeline", 0.2, 4),
        ("FluxControlImg2ImgPipeline", 0.2, 3),  # it rounds up
        ("AnimateDiffVideoToVideoPipeline", 0.1, 4),
    ):
        assert first_step_of(name, num_inference_steps=4, strength=strength) == first


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"strength": 0.2}, "theirs=0.2 leaves no step to run: with 4 steps and strength 0.2"),
        ({"num_inference_steps": 1}, "num_inference_steps=1 leaves no step to run"),
        ({"denoising_end": 1e-4}, "no step is left of 4 steps with denoising_end=0.0001"),
        ({"strength": 0.5, "denoising_end": 0.5}, ""),
        ({"strength": 0.2, "arguments": {"denoising_start": 0.5}}, ""),
    ],
)
def test_a_class_that_runs_as_it_is_is_not_asked_for_nothing(fields, said):
    spec = replace(
        SPEC,
        title="theirs",
        pipeline="StableDiffusionXLPAGImg2ImgPipeline",
        takes=("strength", "denoising_end"),
        parameters=MappingProxyType({"strength": 0.3}),
    )
    request = GenerateRequest(**{"num_inference_steps": 4, **fields})
    asked = {"defaults": {}, "scheduler": None, "names": {"strength": "theirs"}}
    if not said:
        return require_own_steps(request, spec, **asked)
    with pytest.raises(RequestError, match=said):
        require_own_steps(request, spec, **asked)

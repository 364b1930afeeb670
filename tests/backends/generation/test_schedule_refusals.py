"""Windows of steps and lists of noise levels that no scheduler can follow are refused by name."""

import pytest

from backends.errors import RequestError
from backends.generation.schedulers import build_scheduler, parse_scheduler
from backends.generation.step_driver import StepDriver
from backends.generation.step_window import Schedule
from tests.backends import gaussian
from tests.backends.generation.test_schedulers import (
    CONFIGS,
)
from tests.backends.generation.test_step_driver import generate, scheduler_for, steps


@pytest.mark.parametrize(
    ("values", "field", "message"),
    [
        ({"strength": 1.2}, "strength", r"strength=1\.2 is out of range\. Allowed: 0 to 1"),
        ({"denoising_end": -0.1}, "denoising_end", r"denoising_end=-0\.1 is out of range"),
        (
            {"sigmas": [1, 0], "timesteps": [5]},
            "timesteps",
            "sigmas and timesteps exclude each other",
        ),
        ({"sigmas": [0.0]}, "sigmas", "sigmas has 1 values. Give one per step and a last one"),
        ({"sigmas": [float("nan"), 0.0]}, "sigmas", "negative or not finite"),
        ({"sigmas": [1.0, -1.0]}, "sigmas", "negative or not finite"),
        ({"sigmas": [1.0, 2.0, 0.0]}, "sigmas", "sigmas must decrease"),
        ({"sigmas": [1.0, 0.0, 0.0]}, "sigmas", "only the last may be 0"),
        ({"timesteps": []}, "timesteps", "timesteps is empty"),
        ({"timesteps": [5, 5]}, "timesteps", "timesteps must decrease"),
        ({"timesteps": [-5]}, "timesteps", "negative or not finite"),
        (
            {"num_inference_steps": 0},
            "num_inference_steps",
            "num_inference_steps=0 is out of range",
        ),
    ],
)
def test_refuses_a_schedule_that_cannot_be_meant(values, field, message):
    with pytest.raises(RequestError, match=message) as refusal:
        Schedule(**{"num_inference_steps": 4} | values)
    assert refusal.value.field == field


@pytest.mark.parametrize(
    ("window", "field"),
    [({"strength": 0.0}, "strength"), ({"strength": 0.3, "denoising_end": 0.3}, "denoising_end")],
)
def test_refuses_a_window_without_steps(window, field):
    with pytest.raises(RequestError, match=r"no step is left of 4 steps with strength=") as refusal:
        generate("sd1", steps(4, **window))
    assert refusal.value.field == field


@pytest.mark.parametrize(
    ("model_type", "name", "lists", "message"),
    [
        (
            "sd1",
            "ddim",
            {"sigmas": [5.0, 0.0]},
            r"DDIMScheduler does not accept a list of sigmas for this model. Schedulers that may: "
            r"euler, ipndm",
        ),
        (
            "sd1",
            "unipc",
            {"sigmas": [5.0, 0.0]},
            "UniPCMultistepScheduler does not accept a list of sigmas for this model",
        ),
        (
            "sd1",
            "euler_a",
            {"timesteps": [5]},
            "EulerAncestralDiscreteScheduler does not accept a list of timesteps",
        ),
        (
            "sd3",
            "dpmpp_2m",
            {"timesteps": [5]},
            "DPMSolverMultistepScheduler does not accept a list of timesteps",
        ),
        (
            "sd1",
            "euler",
            {"timesteps": [1000, 5]},
            "timesteps begin at 1000. Allowed with EulerDiscreteScheduler: at most 999",
        ),
        (
            "sd3",
            "euler",
            {"sigmas": [14.0, 0.0]},
            "sigmas begin at 14. Allowed for a flow-matching model: at most 1",
        ),
    ],
)
def test_refuses_a_list_that_the_scheduler_cannot_follow(model_type, name, lists, message):
    with pytest.raises(RequestError, match=message):
        StepDriver(scheduler_for(model_type, name), Schedule(num_inference_steps=4, **lists))


def test_refuses_part_of_a_pndm_run_with_runge_kutta_steps():
    scheduler = build_scheduler(
        parse_scheduler({"scheduler": "pndm", "skip_prk_steps": False}), CONFIGS["sd1"], flow=False
    )
    with pytest.raises(
        RequestError, match="'pndm' with skip_prk_steps=false cannot begin or end part-way"
    ):
        gaussian.sample(scheduler, 10, denoising_end=0.5)


def test_refuses_more_steps_than_the_scheduler_has():
    with pytest.raises(
        RequestError, match=r"LCMScheduler cannot follow this schedule: .*50"
    ) as refusal:
        gaussian.sample(scheduler_for("sd1", "lcm"), 60)
    assert refusal.value.field == "num_inference_steps"


@pytest.mark.parametrize("lists", [{"timesteps": [900, 100]}, {"sigmas": [9.0, 1.0, 0.0]}])
def test_refuses_lists_given_to_the_pipeline_itself(lists):
    with pytest.raises(
        RequestError, match=f"{next(iter(lists))} must be given to the StepDriver's Schedule"
    ):
        generate("sd1", steps(2), scheduler="euler", **lists)

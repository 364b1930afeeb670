"""Refuses schedules that no sampler can follow, or that leave no step to run. Imports no torch."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from backends.errors import RequestError
from backends.files.call_rules import first_step_of
from backends.generation.scheduler_settings import SIGMA_FLAGS
from backends.generation.schedulers import (
    SCHEDULERS,
    SampledModel,
    SchedulerChoice,
    choose_scheduler,
    no_list,
)
from backends.generation.step_window import BOUNDS, Schedule, require_list
from backends.model_table import ModelSpec
from backends.request import GenerateRequest

NUM_TRAIN_TIMESTEPS = 1000
ONE_MORE = ("DPMSolverMultistepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler")
"""Classes that space one step more than they do."""
SPACED = (*ONE_MORE, "DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler",
          "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
          "KDPM2AncestralDiscreteScheduler", "LMSDiscreteScheduler")  # fmt: skip
"""Classes that space their steps as timestep_spacing says."""
BENDING = (*SIGMA_FLAGS, "use_lu_lambdas")
"""Settings that space them otherwise."""


def require_steps(
    request: GenerateRequest,
    spec: ModelSpec,
    *,
    defaults: Mapping[str, Any],
    scheduler: Mapping[str, Any] | None,
    names: Mapping[str, str],
) -> None:
    """Raise RequestError for a schedule of the StepDriver that cannot be run.

    defaults and scheduler: given at launch. names: as in admission.py.
    """
    steps = request.num_inference_steps or defaults.get("num_inference_steps")
    has_start = request.latents is not None or request.init_image is not None
    choice = choose_scheduler(request.scheduler, scheduler)
    try:
        schedule = Schedule(
            num_inference_steps=steps or spec.num_inference_steps,
            strength=request.strength if has_start else 1.0,
            first_step=request.first_step if has_start else 0,
            stop_step=request.stop_step,
            denoising_end=request.denoising_end,
            sigmas=request.sigmas,
            timesteps=request.timesteps,
        )
        for what in ("sigmas", "timesteps"):
            if (values := getattr(request, what)) is not None:
                _require_list(what, values, choice, spec)
        if schedule.strength > 0:  # at 0 nothing is denoised
            schedule.window(*highest_starts(schedule, choice, spec))
    except RequestError as error:
        raise _as_sent(error, names) from error


def require_own_steps(
    request: GenerateRequest,
    spec: ModelSpec,
    *,
    defaults: Mapping[str, Any],
    scheduler: Mapping[str, Any] | None,
    names: Mapping[str, str],
) -> None:
    """Raise RequestError for a strength or an end with which a class that runs as it is, and which
    takes them, denoises nothing. The arguments are those of require_steps.
    """
    steps = request.num_inference_steps or defaults.get("num_inference_steps")
    steps = steps or spec.num_inference_steps
    given = request.arguments or {}
    is_sent = "strength" in request.model_fields_set
    strength = request.strength if is_sent else spec.parameters.get("strength")
    if "strength" in spec.takes and strength is not None and "denoising_start" not in given:
        first = first_step_of(spec.pipeline, num_inference_steps=steps, strength=strength)
        if first is not None and first >= steps:
            field = "strength" if is_sent else "num_inference_steps"
            name = names.get(field, field)
            value = strength if is_sent else steps
            raise RequestError(
                f"{name}={value:g} leaves no step to run: with {steps} steps and strength "
                f"{strength:g}, {spec.title} would begin at step {first}. Send more steps, or a "
                "higher strength.",
                field=name,
            )
    if "denoising_end" not in spec.takes:
        return
    schedule = Schedule(num_inference_steps=steps, denoising_end=request.denoising_end)
    choice = choose_scheduler(request.scheduler, scheduler)
    try:
        schedule.window(*highest_starts(schedule, choice, spec))
    except RequestError as error:
        raise _as_sent(error, names) from error


def highest_starts(
    schedule: Schedule, choice: SchedulerChoice, spec: ModelSpec
) -> tuple[list[float], int]:
    """Return the timestep at which each step begins, or the highest at which it can as far as is
    known, and the number of timesteps in training.
    """
    settings = {**spec.sampler, **choice.overrides}
    last = settings.get("num_train_timesteps", NUM_TRAIN_TIMESTEPS)
    number = schedule.num_inference_steps
    name = settings.get("_class_name")
    if choice.name is not None:
        facts = SCHEDULERS[choice.name]
        name = facts.settings_of or facts.class_name
    if schedule.timesteps is not None:
        return list(schedule.timesteps), last
    if spec.flow_matching:
        return [last] * number, last
    is_bent = any(settings.get(each) for each in BENDING)
    if schedule.sigmas is not None or name not in SPACED or is_bent:
        return [last - 1] * number, last
    starts = _spaced(number, last, settings, has_one_more=name in ONE_MORE)
    return [min(each + 0.5, last - 1) for each in starts], last  # some round up


def _spaced(
    number: int, last: int, settings: Mapping[str, Any], *, has_one_more: bool
) -> list[float]:
    """Return timesteps as diffusers spaces them, from the highest down."""
    spacing = settings.get("timestep_spacing")
    if settings.get("timestep_type") == "continuous":
        spacing = None
    if spacing == "leading":
        parts = number + has_one_more
        offset = settings.get("steps_offset", 0)
        return [last // parts * (parts - 1 - step) + offset for step in range(number)]
    if spacing == "linspace" and not has_one_more:
        between = max(number - 1, 1)
        top = last - 1 if number > 1 else 0
        return [top * (1 - step / between) for step in range(number)]
    return [last * (1 - step / number) for step in range(number)]


def _require_list(
    what: str, values: Sequence[float], choice: SchedulerChoice, spec: ModelSpec
) -> None:
    sampler = choice.name or str(spec.sampler.get("_class_name", "the checkpoint's scheduler"))
    if not SampledModel.by(spec).takes_list(choice.name, what):
        raise no_list(what, sampler)
    own = spec.sampler.get("num_train_timesteps", NUM_TRAIN_TIMESTEPS)
    longest = choice.overrides.get("num_train_timesteps", own)
    require_list(
        what, values, sampler=sampler, flow=spec.flow_matching, num_train_timesteps=longest
    )


def _as_sent(error: RequestError, names: Mapping[str, str]) -> RequestError:
    """Return the error with the fields under the names that the client used."""
    said = str(error)
    for field in (*BOUNDS, "num_inference_steps", "sigmas", "timesteps"):
        said = re.sub(rf"\b{field}\b", names.get(field, field), said)
    return RequestError(said, field=names.get(error.field or "", error.field))

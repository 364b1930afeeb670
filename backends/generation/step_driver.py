"""Run any diffusers pipeline over a chosen window of steps, and report after each step.

Used by backends/generation/run.py, on every rank alike:

    pipe.scheduler = build_scheduler(choice, pristine, flow=spec.flow_matching)
    schedule = Schedule(num_inference_steps=20, strength=0.6)
    start = InitialLatents(latents=clean, noise=noise)  # None: text to image
    with StepDriver(pipe.scheduler, schedule, start=start, generator=generator) as driver:
        pipe(num_inference_steps=schedule.num_inference_steps, latents=driver.latents, ...)

Do not pass `sigmas`, `timesteps` or `denoising_end` to the pipeline: the driver implements them for
all pipelines, even those without the argument. Inside the `with` it replaces set_timesteps,
set_begin_index and step of this one scheduler instance. So a pipeline needs no callback support: an
exception from `on_step` ends the call of any pipeline. Use one driver per generation.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from backends.errors import RequestError
from backends.generation.scheduler_settings import SIGMA_FLAGS
from backends.generation.schedulers import SCHEDULERS, no_list
from backends.generation.step_window import Schedule, require_list
from backends.request import GenerateRequest

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

SMOOTH = frozenset({"CogVideoXDDIMScheduler"})
"""Samplers that only checkpoints name, and that are smooth in the sense of step_facts."""

OnStep = Callable[[int, int, Tensor], None]
"""on_step(index, num_steps, sample): scheduler step `index` of `num_steps` is done; `sample` is in
the pipeline's layout.
"""


class EndRun(Exception):
    """Raised by `on_step` to end a run early: StepDriver.denoised has what it would lead to."""


REPLACED = ("set_timesteps", "set_begin_index", "step")
LMS_ORDER = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialLatents:
    """Where a run begins, in model space.

    Layout, dtype and device are those of the pipeline's own latents.
    """

    latents: Tensor  # clean; if `noise` is None, already at the first step's noise level
    noise: Tensor | None = None  # the noise to add up to that level, same shape
    # 1 where the run may change `latents`, 0 where it must return to them (inpainting, with noise).
    mask: Tensor | None = None
    # The pipeline multiplies given latents by scheduler.init_noise_sigma.
    is_scaled_by_pipeline: bool = True


class StepDriver:
    """Makes one scheduler instance follow a Schedule while attached. See the module's docstring.

    RequestError if this scheduler cannot follow this schedule: raised by __init__ for lists, by
    set_timesteps for windows.
    """

    def __init__(
        self,
        scheduler: "SchedulerMixin",
        schedule: Schedule,
        *,
        start: InitialLatents | None = None,
        on_step: OnStep | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """generator: for schedulers that draw noise in `step`, if the pipeline passes none."""
        _check_lists(scheduler, schedule)
        # Scheduler steps to run; 0 until the pipeline calls set_timesteps. At second order each
        # step of the schedule is two of them except the last; PNDM needs one more in all.
        self.num_steps = 0
        # The pipeline's `latents` argument, filled in by set_timesteps. None without a start.
        self.latents = None if start is None else start.latents.clone()
        self._scheduler = scheduler
        self._class = type(scheduler)
        self._schedule = schedule
        self._start = start
        self._on_step = on_step
        # Called once the timesteps are chosen, between encoding and denoising.
        self.on_start: Callable[[], None] = lambda: None
        self._generator = generator
        self._takes_generator = "generator" in inspect.signature(self._class.step).parameters
        self._all_timesteps = torch.empty(0)
        self._own_timesteps = torch.empty(0)
        self._host_timesteps = torch.empty(0)
        self._offset = 0
        self._done = 0
        self._last: tuple[Tensor, Tensor] | None = None
        """Prediction and sample of the last step."""

    def __enter__(self) -> Self:
        if any(name in vars(self._scheduler) for name in REPLACED):
            raise RuntimeError(
                f"this {self._class.__name__} already has a driver. Build a scheduler for each "
                "generation."
            )
        if (
            self._generator is not None
            and getattr(self._scheduler, "noise_sampler_seed", 0) is None
        ):
            # DPMSolverSDE takes a seed instead of a generator
            self._scheduler.noise_sampler_seed = self._generator.initial_seed()
        for name in REPLACED:
            if hasattr(self._class, name):
                setattr(self._scheduler, name, self._replacement(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name in REPLACED:
            vars(self._scheduler).pop(name, None)

    def _replacement(self, name: str) -> Callable[..., Any]:
        """Return our method with the class's signature, which pipelines inspect."""
        ours = {
            "set_timesteps": self._set_timesteps,
            "set_begin_index": self._set_begin_index,
            "step": self._step,
        }[name]

        @functools.wraps(getattr(self._scheduler, name))
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return ours(*args, **kwargs)

        if name == "set_timesteps":
            # flux passes default sigmas to every scheduler, even to a class that takes none
            replacement.__signature__ = inspect.signature(self._set_timesteps)
        return replacement

    def _set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Let the class compute its whole list, then show the pipeline only the window."""
        if timesteps is not None or not _is_default(sigmas):
            what = "sigmas" if timesteps is None else "timesteps"
            raise RequestError(
                f"{what} must be given to the StepDriver's Schedule, not to the pipeline.",
                field=what,
            )
        arguments = _shift_arguments(self._scheduler, mu) | self._list_arguments(
            num_inference_steps, sigmas
        )
        try:
            self._class.set_timesteps(self._scheduler, device=device, **arguments)
        except ValueError as error:  # such as LCM's limit of 50 steps
            raise RequestError(
                f"{self._class.__name__} cannot follow this schedule: {error}",
                field="num_inference_steps",
            ) from error
        self._show_window()
        self._done = 0
        if self._start is not None:
            self.latents.copy_(
                noised_start(self._scheduler, self._start, self._schedule, self._own_timesteps[:1])
            )
        self.on_start()

    def _list_arguments(
        self, num_inference_steps: int | None, sigmas: Sequence[float] | None
    ) -> dict[str, Any]:
        """Return set_timesteps arguments: the schedule's own list, else the pipeline's default."""
        if self._schedule.sigmas is not None or self._schedule.timesteps is not None:
            return _own_list(self._scheduler, self._schedule)
        if sigmas is None:
            return {"num_inference_steps": num_inference_steps}
        return (
            {"sigmas": sigmas}
            if _takes(self._scheduler, "sigmas")
            else {"num_inference_steps": len(sigmas)}
        )

    def _show_window(self) -> None:
        scheduler, order = self._scheduler, self._scheduler.order
        self._all_timesteps = scheduler.timesteps
        if _is_pndm(scheduler):
            self._own_timesteps = _pndm_window(scheduler, self._schedule)
        else:
            steps = _window(scheduler, self._schedule, scheduler.timesteps[::order])
            self._offset = steps.start * order
            self._own_timesteps = scheduler.timesteps[self._offset : steps.stop * order]
        self.num_steps = len(self._own_timesteps)
        # copied once: many classes index tables by timestep, which would synchronise at every step
        self._host_timesteps = self._own_timesteps.cpu()
        self._set_begin_index(0)
        scheduler.timesteps = _as_model_counts(scheduler, self._own_timesteps)

    def _set_begin_index(self, begin_index: int = 0) -> None:
        """Shift the index by the window: pipelines count from the first timestep that they see."""
        if hasattr(self._class, "set_begin_index"):
            self._class.set_begin_index(self._scheduler, begin_index + self._offset)

    def _step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self._done == 0:
            self._check_start_used(sample)
            # multistep and distilled schedulers look up neighbouring timesteps, DDPM the current
            # one; on the CPU like _host_timesteps
            self._scheduler.timesteps = self._all_timesteps.cpu()
        if self._takes_generator and kwargs.get("generator") is None:
            kwargs["generator"] = self._generator
        if self._class.__name__ == "LMSDiscreteScheduler":
            # LMS would derive its order from the position in the list, not from the steps done
            kwargs["order"] = min(self._done + 1, LMS_ORDER)
        self._last = model_output, sample
        output = self._class.step(
            self._scheduler, model_output, self._host_timesteps[self._done], sample, *args, **kwargs
        )
        self._done += 1
        if self._start is not None and self._start.mask is not None:
            output = (self._with_kept_parts(output[0]), *tuple(output)[1:])
        if self._on_step is not None:
            self._on_step(self._done - 1, self.num_steps, output[0])
        if isinstance(output, tuple) and len(output) == 1 and self.num_steps == 1:
            # in a run of one step PixArt-alpha reads item 1, the clean sample, which is item 0 here
            return output[0], output[0]
        return output

    @property
    def num_done(self) -> int:
        return self._done

    def denoised(self) -> Tensor:
        """Return the clean sample that the prediction of the last step means, in the pipeline's
        layout and dtype.
        """
        prediction, sample = self._last
        clean = _clean(
            self._scheduler, prediction, float(self._host_timesteps[self._done - 1]), sample
        )
        if self._start is not None and self._start.mask is not None:
            mask = self._start.mask
            clean = mask * clean + (1 - mask) * self._start.latents.float()
        return clean.to(sample.dtype)

    def _with_kept_parts(self, sample: Tensor) -> Tensor:
        """Put the initial latents back outside the mask, noised to the next step's level.

        After the last step they are clean.
        """
        start, left = self._start, self._timesteps_left()
        kept = add_noise(self._scheduler, start, left[:1]) if len(left) else start.latents.float()
        return (start.mask * sample.float() + (1 - start.mask) * kept).to(sample.dtype)

    def _timesteps_left(self) -> Tensor:
        """Return the timesteps after those done, also beyond the window.

        A run that ends early leaves some, and its result is noisy.
        """
        if self._done < self.num_steps or _is_pndm(self._scheduler):
            return self._own_timesteps[self._done :]
        return self._all_timesteps[self._offset + self._done :]

    def _check_start_used(self, sample: Tensor) -> None:
        """Raise RuntimeError if the pipeline copied `latents` before they were filled in."""
        if (
            self._start is not None
            and not self._start.is_scaled_by_pipeline
            and sample.data_ptr() != self.latents.data_ptr()
        ):
            raise RuntimeError(
                f"the pipeline copied its initial latents ({self.latents.dtype}, "
                f"{self.latents.device}) to {sample.dtype}, {sample.device}. Pass InitialLatents "
                "of the pipeline's dtype and device."
            )


def noised_start(
    scheduler: "SchedulerMixin", start: InitialLatents, schedule: Schedule, timestep: Tensor
) -> Tensor:
    """Return the pipeline's `latents` argument for a run that begins at this schedule's first step.

    scheduler: after set_timesteps and set_begin_index. timestep: (1,), where the run begins.
    Returns the shape of start.latents, float32.
    """
    is_flow = hasattr(scheduler, "scale_noise")
    initial_sigma = 1.0 if is_flow else float(scheduler.init_noise_sigma)
    if start.noise is None:
        latents = start.latents.float()
    elif schedule.starts_from_noise:
        latents = start.noise.float() * initial_sigma
    else:
        latents = add_noise(scheduler, start, timestep)
    return latents / initial_sigma if start.is_scaled_by_pipeline else latents


def step_facts(scheduler: "SchedulerMixin | None", request: GenerateRequest) -> dict[str, bool]:
    """Return what step caches ask of a sampler. A pipeline that upscales latents has none.

    is_smooth: it is known to evaluate the denoiser once in each step and to add no noise, so that
    predictions change smoothly. is_even: its steps are evenly spaced in the model's time, as they
    are unless something asks for other sigmas.
    """
    if scheduler is None:
        return {"is_smooth": False, "is_even": False}
    name, config = type(scheduler).__name__, scheduler.config
    known = [facts for facts in SCHEDULERS.values() if facts.class_name == name]
    return {
        "is_smooth": (
            name in SMOOTH or any(facts.order == 1 and not facts.adds_noise for facts in known)
        )
        and not config.get("stochastic_sampling")
        and not str(config.get("algorithm_type")).startswith("sde"),
        "is_even": request.sigmas is None
        and request.timesteps is None
        and not any(config.get(flag) for flag in SIGMA_FLAGS),
    }


def add_noise(scheduler: "SchedulerMixin", start: InitialLatents, timestep: Tensor) -> Tensor:
    """Return the start's latents, noised up to the level of `timestep` (1,), in float32."""
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(
            start.latents.float(), timestep=timestep, noise=start.noise.float()
        )
    return scheduler.add_noise(start.latents.float(), noise=start.noise.float(), timesteps=timestep)


def _clean(
    scheduler: "SchedulerMixin", prediction: Tensor, timestep: float, sample: Tensor
) -> Tensor:
    """Return the clean sample that a prediction at this timestep means, in float32."""
    sample, prediction = sample.float(), prediction.float()
    if _is_flow_list(scheduler):
        return sample - timestep / scheduler.config.num_train_timesteps * prediction
    levels = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).double().sqrt().cpu()
    level = float(np.interp(timestep, np.arange(len(levels)), levels.numpy()))
    signal, noise = 1 / math.sqrt(1 + level**2), level / math.sqrt(1 + level**2)
    if float(scheduler.init_noise_sigma) > 1:  # samples are clean + level * noise
        sample = sample * signal
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return prediction
    if kind == "v_prediction":
        return signal * sample - noise * prediction
    return (sample - noise * prediction) / signal


def _is_default(sigmas: Sequence[float] | None) -> bool:
    """Return whether these are None or flux's default: evenly spaced levels."""
    return sigmas is None or np.allclose(sigmas, np.linspace(1, 1 / len(sigmas), len(sigmas)))


def _takes(scheduler: "SchedulerMixin", what: str) -> bool:
    """Return whether set_timesteps accepts a list of `sigmas` or `timesteps` with this config."""
    if what not in inspect.signature(type(scheduler).set_timesteps).parameters:
        return False
    with_flow_sigmas = scheduler.config.get("use_flow_sigmas")  # None: the class lacks the field
    return with_flow_sigmas is None or with_flow_sigmas == (what == "sigmas")


def _is_flow_list(scheduler: "SchedulerMixin") -> bool:
    """Return whether sigmas are flow-matching: from 1, without the final 0, to be shifted."""
    return hasattr(scheduler, "scale_noise") or bool(scheduler.config.get("use_flow_sigmas"))


def _check_lists(scheduler: "SchedulerMixin", schedule: Schedule) -> None:
    for what in ("sigmas", "timesteps"):
        values = getattr(schedule, what)
        if values is None:
            continue
        if not _takes(scheduler, what):
            raise no_list(what, type(scheduler).__name__)
        require_list(
            what,
            values,
            sampler=type(scheduler).__name__,
            flow=_is_flow_list(scheduler),
            num_train_timesteps=scheduler.config.num_train_timesteps,
        )


def _own_list(scheduler: "SchedulerMixin", schedule: Schedule) -> dict[str, Any]:
    """Return set_timesteps arguments for a list to be used unchanged.

    Config fields that would alter it are switched off.
    """
    bends = {flag: False for flag in SIGMA_FLAGS if flag in scheduler.config}
    if not _is_flow_list(scheduler):
        scheduler.register_to_config(**bends)
        return (
            {"sigmas": np.array(schedule.sigmas)}
            if schedule.sigmas is not None
            else {"timesteps": list(schedule.timesteps)}
        )
    straight = {"use_dynamic_shifting": False, "shift_terminal": None, "flow_shift": 1.0}
    scheduler.register_to_config(
        **bends, **{key: value for key, value in straight.items() if key in scheduler.config}
    )
    if hasattr(scheduler, "set_shift"):
        scheduler.set_shift(1.0)
    if schedule.timesteps is not None:
        # passed as sigmas: with `timesteps` the class would keep sigmas that do not match them
        return {"sigmas": np.array(schedule.timesteps) / scheduler.config.num_train_timesteps}
    # these classes append the final 0; if the list ends higher, the window stops before that 0
    return {
        "sigmas": np.array(schedule.sigmas[:-1] if schedule.sigmas[-1] == 0 else schedule.sigmas)
    }


def _shift_arguments(scheduler: "SchedulerMixin", mu: float | None) -> dict[str, float]:
    """Return the pipeline's resolution-dependent shift `mu` as this class takes it."""
    if mu is None or not scheduler.config.get("use_dynamic_shifting"):
        return {}
    if "mu" in inspect.signature(type(scheduler).set_timesteps).parameters:
        return {"mu": mu}
    is_linear = scheduler.config.get("time_shift_type") == "linear"
    # the same curve as a static shift
    scheduler.register_to_config(shift=mu if is_linear else math.exp(mu))
    return {}


def _window(scheduler: "SchedulerMixin", schedule: Schedule, starts: Tensor) -> range:
    """Return the steps to run. starts: (steps,), the timestep at which each begins."""
    num_train_timesteps = scheduler.config.num_train_timesteps
    if scheduler.config.get("timestep_type") == "continuous" and _knows_timestep_type(scheduler):
        # continuous timesteps are noise levels: use positions, as if spaced evenly from T - 1
        starts = torch.linspace(num_train_timesteps, 0, len(starts) + 1)[:-1] - 1
    if schedule.sigmas is not None:
        starts = starts[: schedule.num_inference_steps]
    return schedule.window(starts.tolist(), num_train_timesteps)


def _is_pndm(scheduler: "SchedulerMixin") -> bool:
    return hasattr(scheduler, "prk_timesteps")


def _pndm_window(scheduler: "SchedulerMixin", schedule: Schedule) -> Tensor:
    """Return PNDM's timesteps for the window. The second is repeated to correct the first step."""
    if len(scheduler.prk_timesteps):
        if schedule.is_partial:
            raise RequestError(
                "scheduler 'pndm' with skip_prk_steps=false cannot begin or end part-way. Set "
                "skip_prk_steps=true, or choose another scheduler.",
                field="scheduler",
            )
        return scheduler.timesteps
    starts = torch.cat([scheduler.timesteps[:1], scheduler.timesteps[2:]])
    steps = _window(scheduler, schedule, starts)
    chosen = starts[steps.start : steps.stop]
    return torch.cat([chosen[:2], chosen[1:]])


def _knows_timestep_type(scheduler: "SchedulerMixin") -> bool:
    return "timestep_type" in inspect.signature(type(scheduler).__init__).parameters


def _as_model_counts(scheduler: "SchedulerMixin", timesteps: Tensor) -> Tensor:
    """Return the timesteps for the denoiser, whose convention may differ from the scheduler's.

    With timestep_type "continuous" it takes ln(sigma) / 4: Karras et al., arXiv:2206.00364, table
    1.
    """
    if scheduler.config.get("timestep_type") != "continuous" or _knows_timestep_type(scheduler):
        return timesteps
    cumulative = scheduler.alphas_cumprod.to(device=timesteps.device, dtype=torch.float64)
    log_sigmas = 0.5 * torch.log((1 - cumulative) / cumulative)
    position = timesteps.to(torch.float64).clamp(0, len(log_sigmas) - 1)
    below, above = position.floor().long(), position.ceil().long()
    return (torch.lerp(log_sigmas[below], log_sigmas[above], position - below) / 4).float()

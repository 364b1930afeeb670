"""Runs any diffusers pipeline over a chosen window of steps, and tells after each step how far it
is.

Used by backends/generation/pipeline.py, on every rank alike:

    pipe.scheduler = build_scheduler(choice, pristine, flow=spec.flow_matching)
    schedule = Schedule(num_inference_steps=20, strength=0.6)
    # None: text to image
    start = InitialLatents(latents=clean, noise=noise, is_scaled_by_pipeline=...)
    with StepDriver(pipe.scheduler, schedule, start=start, on_step=report, generator=generator) as
    driver:
        pipe(num_inference_steps=schedule.num_inference_steps, latents=driver.latents, ...)

Do not give the pipeline `sigmas`, `timesteps` or `denoising_end`: the driver does these for all
pipelines, also those without the argument. It replaces set_timesteps, set_begin_index and step of
the one scheduler instance inside the `with` and nothing after it, so a pipeline needs no callback
support: an exception from `on_step` passes through every pipeline. One driver is for one
generation.
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
from backends.generation.schedulers import SCHEDULERS, SIGMA_FLAGS
from backends.generation.step_window import Schedule

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

OnStep = Callable[[int, int, Tensor], None]
"""on_step(index, num_steps, sample): scheduler step `index` of `num_steps` is done; `sample` is in
the pipeline's layout.
"""

REPLACED = ("set_timesteps", "set_begin_index", "step")
LMS_ORDER = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialLatents:
    """What the run begins from, in model space and in the layout, dtype and device of the
    pipeline's own latents.
    """

    latents: Tensor  # clean; without `noise` already at the level of the first step
    noise: Tensor | None = None  # to be added up to that level, of the same shape
    # 1 where the run may change `latents`, 0 where it must return to them (inpainting, with noise).
    mask: Tensor | None = None
    # The pipeline multiplies given latents by scheduler.init_noise_sigma.
    is_scaled_by_pipeline: bool = True


class StepDriver:
    """Makes one scheduler instance follow a Schedule while attached. See the module's text.

    num_steps: scheduler steps that will be run, known once the pipeline has called set_timesteps (0
    before). At second order a step of the schedule is two of them, the last one excepted; PNDM
    needs one more than the schedule has steps.
    latents: what the pipeline must be given as `latents`; None without a start. It is filled in
    when set_timesteps is called.
    generator: for schedulers that draw noise in step; used where the pipeline passes none.
    on_start: is called when the pipeline has chosen its timesteps, which is between encoding and
    denoising. Raises RequestError if this scheduler cannot follow this schedule: here for lists, in
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
        _check_lists(scheduler, schedule)
        self.num_steps = 0
        self.latents = None if start is None else start.latents.clone()
        self._scheduler = scheduler
        self._class = type(scheduler)
        self._schedule = schedule
        self._start = start
        self._on_step = on_step
        self.on_start: Callable[[], None] = lambda: None
        self._generator = generator
        self._takes_generator = "generator" in inspect.signature(self._class.step).parameters
        self._all_timesteps = torch.empty(0)
        self._own_timesteps = torch.empty(0)
        self._host_timesteps = torch.empty(0)
        self._offset = 0
        self._done = 0

    def __enter__(self) -> Self:
        if any(name in vars(self._scheduler) for name in REPLACED):
            raise RuntimeError(
                f"this {self._class.__name__} is driven already. Build a scheduler for each "
                "generation."
            )
        if (
            self._generator is not None
            and getattr(self._scheduler, "noise_sampler_seed", 0) is None
        ):
            self._scheduler.noise_sampler_seed = (
                self._generator.initial_seed()
            )  # DPMSolverSDE draws from a seed, not from a generator
        for name in REPLACED:
            if hasattr(self._class, name):
                setattr(self._scheduler, name, self._replacement(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name in REPLACED:
            vars(self._scheduler).pop(name, None)

    def _replacement(self, name: str) -> Callable[..., Any]:
        """Ours, under the class's signature: pipelines look for arguments such as `eta` in it."""
        ours = {
            "set_timesteps": self._set_timesteps,
            "set_begin_index": self._set_begin_index,
            "step": self._step,
        }[name]

        @functools.wraps(getattr(self._scheduler, name))
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return ours(*args, **kwargs)

        if (
            name == "set_timesteps"
        ):  # also for a class that takes no sigmas: flux passes its default ones to every scheduler
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
        """Let the class make its whole list, then show the pipeline the part of it that is in the
        window.
        """
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
                f"{self._class.__name__} cannot make this schedule: {error}",
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
        """The list of the schedule, else the pipeline's own default, in the arguments this class
        has.
        """
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
        self._host_timesteps = (
            self._own_timesteps.cpu()
        )  # once: many classes look up tables by a timestep, for which the host would wait
        self._set_begin_index(0)
        scheduler.timesteps = _as_model_counts(scheduler, self._own_timesteps)

    def _set_begin_index(self, begin_index: int = 0) -> None:
        """Pipelines mean the first timestep they see."""
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
            # multistep and distilled ones look up their neighbours in it, DDPM the host's timestep
            self._scheduler.timesteps = self._all_timesteps.cpu()
        if self._takes_generator and kwargs.get("generator") is None:
            kwargs["generator"] = self._generator
        if self._class.__name__ == "LMSDiscreteScheduler":
            kwargs["order"] = min(
                self._done + 1, LMS_ORDER
            )  # it takes the order from the position, not from the steps it has seen
        output = self._class.step(
            self._scheduler, model_output, self._host_timesteps[self._done], sample, *args, **kwargs
        )
        self._done += 1
        if self._start is not None and self._start.mask is not None:
            output = (self._with_kept_parts(output[0]), *tuple(output)[1:])
        if self._on_step is not None:
            self._on_step(self._done - 1, self.num_steps, output[0])
        if isinstance(output, tuple) and len(output) == 1 and self.num_steps == 1:
            return (
                output[0],
                output[0],
            )  # in a run of one step PixArt-alpha reads item 1, the clean sample, which this is
        return output

    def _with_kept_parts(self, sample: Tensor) -> Tensor:
        """Outside the mask the start's own latents, with its noise up to the level of the next
        step; none after the last one.
        """
        start, left = self._start, self._timesteps_left()
        kept = add_noise(self._scheduler, start, left[:1]) if len(left) else start.latents.float()
        return (start.mask * sample.float() + (1 - start.mask) * kept).to(sample.dtype)

    def _timesteps_left(self) -> Tensor:
        """Those after the steps that are done, of the whole list: a run that ends early leaves
        some, and its result is noisy.
        """
        if self._done < self.num_steps or _is_pndm(self._scheduler):
            return self._own_timesteps[self._done :]
        return self._all_timesteps[self._offset + self._done :]

    def _check_start_used(self, sample: Tensor) -> None:
        """A pipeline that takes latents as they are must have taken ours, not a copy from before
        they were filled in.
        """
        if (
            self._start is not None
            and not self._start.is_scaled_by_pipeline
            and sample.data_ptr() != self.latents.data_ptr()
        ):
            raise RuntimeError(
                f"the pipeline copied its initial latents ({self.latents.dtype}, "
                f"{self.latents.device}) "
                f"to {sample.dtype}, {sample.device}. Give Start latents of the pipeline's dtype "
                "and device."
            )


def noised_start(
    scheduler: "SchedulerMixin", start: InitialLatents, schedule: Schedule, timestep: Tensor
) -> Tensor:
    """Return what the pipeline must be given as latents, so that the run continues rightly from its
    first step.

    scheduler: after set_timesteps and set_begin_index. timestep: (1,), where the run begins.
    Returns start.latents' shape, float32.
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


def add_noise(scheduler: "SchedulerMixin", start: InitialLatents, timestep: Tensor) -> Tensor:
    """The start's latents with its noise up to the level of `timestep` (1,): float32, the sample's
    own scale.
    """
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(
            start.latents.float(), timestep=timestep, noise=start.noise.float()
        )
    return scheduler.add_noise(start.latents.float(), noise=start.noise.float(), timesteps=timestep)


def _is_default(sigmas: Sequence[float] | None) -> bool:
    """None, or the even levels that flux gives when its caller gave none."""
    return sigmas is None or np.allclose(sigmas, np.linspace(1, 1 / len(sigmas), len(sigmas)))


def _takes(scheduler: "SchedulerMixin", what: str) -> bool:
    """Whether set_timesteps accepts a list of `sigmas` or `timesteps` with this config."""
    if what not in inspect.signature(type(scheduler).set_timesteps).parameters:
        return False
    with_flow_sigmas = scheduler.config.get(
        "use_flow_sigmas"
    )  # None: a class that has no such field
    return with_flow_sigmas is None or with_flow_sigmas == (what == "sigmas")


def _is_flow_list(scheduler: "SchedulerMixin") -> bool:
    """Whether a list of sigmas is one of a flow-matching schedule: from 1, without the last 0, to
    be shifted.
    """
    return hasattr(scheduler, "scale_noise") or bool(scheduler.config.get("use_flow_sigmas"))


def _check_lists(scheduler: "SchedulerMixin", schedule: Schedule) -> None:
    for what in ("sigmas", "timesteps"):
        values = getattr(schedule, what)
        if values is None:
            continue
        if not _takes(scheduler, what):
            able = ", ".join(
                name for name, facts in SCHEDULERS.items() if getattr(facts, f"takes_{what}")
            )
            raise RequestError(
                f"{type(scheduler).__name__} takes no list of {what} for this model. Schedulers "
                f"that may: {able}.",
                field=what,
            )
        highest = scheduler.config.num_train_timesteps - (0 if _is_flow_list(scheduler) else 1)
        if what == "timesteps" and values[0] > highest:
            raise RequestError(
                f"timesteps begin at {values[0]}. Allowed: at most {highest}.", field=what
            )
        if what == "sigmas" and _is_flow_list(scheduler) and values[0] > 1:
            raise RequestError(
                f"sigmas begin at {values[0]:g}. Allowed for a flow-matching model: at most 1.",
                field=what,
            )


def _own_list(scheduler: "SchedulerMixin", schedule: Schedule) -> dict[str, Any]:
    """set_timesteps arguments for a list that is meant as it stands: nothing in the config may bend
    it.
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
    if (
        schedule.timesteps is not None
    ):  # as sigmas, since given timesteps would be used beside sigmas that do not belong to them
        return {"sigmas": np.array(schedule.timesteps) / scheduler.config.num_train_timesteps}
    # these classes append the last 0 themselves; a list that ends higher is cut by the window, one
    # step before that 0
    return {
        "sigmas": np.array(schedule.sigmas[:-1] if schedule.sigmas[-1] == 0 else schedule.sigmas)
    }


def _shift_arguments(scheduler: "SchedulerMixin", mu: float | None) -> dict[str, float]:
    """The pipeline's resolution-dependent shift `mu`, as this class takes it."""
    if mu is None or not scheduler.config.get("use_dynamic_shifting"):
        return {}
    if "mu" in inspect.signature(type(scheduler).set_timesteps).parameters:
        return {"mu": mu}
    is_linear = scheduler.config.get("time_shift_type") == "linear"
    scheduler.register_to_config(
        shift=mu if is_linear else math.exp(mu)
    )  # the same curve, written as a static shift
    return {}


def _window(scheduler: "SchedulerMixin", schedule: Schedule, starts: Tensor) -> range:
    """Steps of the schedule to run. starts: (steps,), the timestep at which each begins."""
    num_train_timesteps = scheduler.config.num_train_timesteps
    if scheduler.config.get("timestep_type") == "continuous" and _knows_timestep_type(scheduler):
        # such timesteps are noise levels: go by position in the list, as if it were spread evenly
        # from T - 1
        starts = torch.linspace(num_train_timesteps, 0, len(starts) + 1)[:-1] - 1
    if schedule.sigmas is not None:
        starts = starts[: schedule.num_inference_steps]
    return schedule.window(starts.tolist(), num_train_timesteps)


def _is_pndm(scheduler: "SchedulerMixin") -> bool:
    return hasattr(scheduler, "prk_timesteps")


def _pndm_window(scheduler: "SchedulerMixin", schedule: Schedule) -> Tensor:
    """PNDM's list for the window. It repeats its second timestep, where the first step is
    corrected, wherever it begins.
    """
    if len(scheduler.prk_timesteps):
        if schedule.is_partial:
            raise RequestError(
                "scheduler 'pndm' with skip_prk_steps=false cannot begin or end part-way. Set "
                "skip_prk_steps=true, or take another.",
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
    """The timesteps to show the denoiser, which may count otherwise than a scheduler of another
    class than its own.

    With timestep_type "continuous" it wants ln(sigma) / 4 (Karras et al., arXiv:2206.00364, table
    1).
    """
    if scheduler.config.get("timestep_type") != "continuous" or _knows_timestep_type(scheduler):
        return timesteps
    cumulative = scheduler.alphas_cumprod.to(device=timesteps.device, dtype=torch.float64)
    log_sigmas = 0.5 * torch.log((1 - cumulative) / cumulative)
    position = timesteps.to(torch.float64).clamp(0, len(log_sigmas) - 1)
    below, above = position.floor().long(), position.ceil().long()
    return (torch.lerp(log_sigmas[below], log_sigmas[above], position - below) / 4).float()

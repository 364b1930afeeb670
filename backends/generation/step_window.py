"""Which steps of the noise schedule one generation runs.

Imports no torch, so that rank 0 can refuse a bad request early. backends/generation/step_driver.py
makes a scheduler follow the schedule.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from backends.errors import RequestError
from backends.request import GenerateRequest

BOUNDS = {"strength": 1.0, "first_step": 0, "denoising_end": 1.0, "stop_step": None}
"""What bounds the window, and the values that leave it whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A list of steps and the window of it to run. RequestError for values that make no sense."""

    num_inference_steps: int  # length of the whole list, unless sigmas or timesteps give it
    strength: float = 1.0  # begin at step floor(steps * (1 - strength))
    denoising_end: float = 1.0  # leave out timesteps below round(T * (1 - end)), of T in training
    first_step: int = 0  # begin no earlier than here
    stop_step: int | None = None  # end before here
    # The list as noise levels, non-increasing; the last is where the run ends, usually 0.
    sigmas: Sequence[float] | None = None
    timesteps: Sequence[float] | None = None  # the list as timesteps, decreasing

    def __post_init__(self) -> None:
        for name in ("strength", "denoising_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise RequestError(
                    f"{name}={getattr(self, name)} is out of range. Allowed: 0 to 1.", field=name
                )
        if self.sigmas is not None and self.timesteps is not None:
            raise RequestError(
                "sigmas and timesteps exclude each other. Send one of them.", field="timesteps"
            )
        if self.sigmas is not None:
            _check_sigmas(self.sigmas)
            object.__setattr__(self, "num_inference_steps", len(self.sigmas) - 1)
        if self.timesteps is not None:
            _check_timesteps(self.timesteps)
            object.__setattr__(self, "num_inference_steps", len(self.timesteps))
        if self.num_inference_steps < 1:
            raise RequestError(
                f"num_inference_steps={self.num_inference_steps} is out of range. Allowed: 1 or "
                "more.",
                field="num_inference_steps",
            )

    @property
    def is_partial(self) -> bool:
        """Whether the window may be smaller than the whole list."""
        return (
            self.strength < 1
            or self.denoising_end < 1
            or self.first_step > 0
            or self.stop_step is not None
        )

    @property
    def starts_from_noise(self) -> bool:
        """Whether the run begins at full noise, where nothing of the given latents remains."""
        return self.strength == 1 and self.first_step == 0

    def window(self, timesteps: Sequence[float], num_train_timesteps: int) -> range:
        """Return the steps to run. RequestError if there are none.

        timesteps: where each step of the whole list begins.
        """
        count = len(timesteps)
        # rounding keeps 10 * (1 - 0.9) = 0.9999999999999998 and float32's 0.3 on the intended step
        first = max(self.first_step, math.floor(round(count * (1 - self.strength), 5)))
        stop = count if self.stop_step is None else min(count, self.stop_step)
        if self.denoising_end < 1:
            cutoff = round(num_train_timesteps * (1 - self.denoising_end))
            before = sum(timestep >= cutoff for timestep in timesteps)
            stop = min(stop, before if self.denoising_end > 0 else 0)
        if first >= stop:
            raise self._no_step(count, first, stop)
        return range(first, stop)

    def _no_step(self, count: int, first: int, stop: int) -> RequestError:
        """Return the error for a window without a step, which names what makes it so."""
        given = {
            name: getattr(self, name) for name in BOUNDS if getattr(self, name) != BOUNDS[name]
        }
        begin = "first_step" if self.first_step == first > 0 else "strength"
        end = "stop_step" if self.stop_step == stop else "denoising_end"
        fields = [name for name in (end, begin) if name in given] or ["num_inference_steps"]
        said = ", ".join(f"{name}={value:g}" for name, value in given.items())
        return RequestError(
            f"no step is left of {count} steps with {said}: the first would be step {max(0, first)}"
            f", and the run ends before step {max(0, stop)}. Send other values, or more steps.",
            field=fields[0],
        )


def _check_sigmas(sigmas: Sequence[float]) -> None:
    if len(sigmas) < 2:
        raise RequestError(
            f"sigmas has {len(sigmas)} values. Give one per step and a last one, usually 0.",
            field="sigmas",
        )
    if not all(math.isfinite(sigma) and sigma >= 0 for sigma in sigmas):
        raise RequestError(
            "sigmas holds a value that is negative or not finite. Give noise levels of 0 or more.",
            field="sigmas",
        )
    if (
        any(later > earlier for earlier, later in zip(sigmas, sigmas[1:], strict=False))
        or sigmas[-2] == 0
    ):
        raise RequestError(
            "sigmas must decrease, and only the last may be 0. Sort them from the noisiest down.",
            field="sigmas",
        )


def _check_timesteps(timesteps: Sequence[float]) -> None:
    if not len(timesteps):
        raise RequestError(
            "timesteps is empty. Give one timestep per step, or leave the field out.",
            field="timesteps",
        )
    if not all(math.isfinite(timestep) and timestep >= 0 for timestep in timesteps):
        raise RequestError(
            "timesteps holds a value that is negative or not finite. Give timesteps of 0 or more.",
            field="timesteps",
        )
    if any(later >= earlier for earlier, later in zip(timesteps, timesteps[1:], strict=False)):
        raise RequestError(
            "timesteps must decrease. Sort them from the noisiest down.", field="timesteps"
        )


def require_list(
    what: str, values: Sequence[float], *, sampler: str, flow: bool, num_train_timesteps: int = 1000
) -> None:
    """Raise RequestError for a list of `what`, sigmas or timesteps, that begins too high.

    flow: whether the sampler counts as flow-matching models do.
    """
    highest = num_train_timesteps - (0 if flow else 1)
    if what == "timesteps" and values[0] > highest:
        raise RequestError(
            f"timesteps begin at {values[0]:g}. Allowed with {sampler}: at most {highest}.",
            field=what,
        )
    if what == "sigmas" and flow and values[0] > 1:
        raise RequestError(
            f"sigmas begin at {values[0]:g}. Allowed for a flow-matching model: at most 1.",
            field=what,
        )


def schedule_of(request: GenerateRequest) -> Schedule:
    """Return the schedule of a resolved request. Without latents it begins at the first step."""
    return Schedule(
        num_inference_steps=request.num_inference_steps,
        strength=request.strength if request.latents is not None else 1.0,
        first_step=request.first_step if request.latents is not None else 0,
        stop_step=request.stop_step,
        denoising_end=request.denoising_end,
        sigmas=request.sigmas,
        timesteps=request.timesteps,
    )

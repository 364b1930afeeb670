"""Parse --step_cache and refuse it where it cannot work. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from backends.errors import ConfigError, UnsupportedError
from backends.model_table import ModelSpec
from backends.plan import ParallelPlan

Kind = Literal["first_block", "taylor", "deep", "prediction"]
KINDS: dict[str, tuple[Kind, ...]] = {
    "transformer": ("first_block", "taylor", "prediction"),
    "unet": ("deep", "prediction"),
}
"""Kind of denoiser -> the caches that it can use, the default first."""

DEFAULTS: dict[str, float] = {"first_block": 0.08, "taylor": 3, "deep": 2, "prediction": 2}
FIRST_STEPS = 3
"""Steps at the start that `prediction` computes: a line needs two, and the first changes most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCacheSpec:
    """A validated --step_cache."""

    kind: Kind
    # first_block: a step is skipped if the first block's residual changed relatively by less.
    # the others: every value-th step is computed in full.
    value: float

    @property
    def is_regular(self) -> bool:
        """Whether the step's number alone says if it is skipped, so that every part of a program
        can tell.
        """
        return self.kind != "first_block"

    @property
    def skips_whole_steps(self) -> bool:
        """Whether nothing of the denoiser runs in a skipped step, so that a method knows nothing
        of it. The others run its outermost parts.
        """
        return self.kind == "prediction"

    def skips(self, step: int) -> bool:
        """Return whether `taylor` or `deep` skips this step, counted from 0."""
        return self.kind in ("taylor", "deep") and step % int(self.value) != 0

    def skips_whole(self, step: int, num_steps: int) -> bool:
        """Return whether `prediction` skips this step of so many. It computes the last one, which
        the image shows most, and every n-th before it.
        """
        to_come = num_steps - 1 - step
        return self.skips_whole_steps and step >= FIRST_STEPS and to_come % int(self.value) != 0

    def __str__(self) -> str:
        return f"{self.kind},{self.value:g}"


def parse_step_cache(text: str, spec: ModelSpec) -> StepCacheSpec:
    """Parse KIND or KIND,VALUE. ConfigError if it does not fit this model type."""
    kind, _, value = text.replace(" ", "").partition(",")
    allowed = KINDS.get(spec.denoiser, ())
    if not allowed:
        raise ConfigError(
            f"--step_cache={text} is not allowed: {spec.title} has neither a UNet nor a "
            "transformer. Leave it out."
        )
    if kind not in allowed:
        fit = " or ".join(f"{name},{DEFAULTS[name]:g}" for name in allowed)
        raise ConfigError(
            f"--step_cache={text} is not allowed: type {spec.name!r} has a {spec.denoiser}. "
            f"Allowed: {fit}."
        )
    is_threshold = kind == "first_block"
    try:
        number = float(value) if value else DEFAULTS[kind]
    except ValueError:
        number = -1.0
    if not (0 <= number <= 10 if is_threshold else 2 <= number <= 100 and number == int(number)):
        limits = "a number from 0 to 10" if is_threshold else "a whole number from 2 to 100"
        raise ConfigError(
            f"--step_cache={text} is not allowed. After '{kind},' give {limits}, such as "
            f"{kind},{DEFAULTS[kind]:g}."
        )
    return StepCacheSpec(kind=kind, value=number)


def require_step_cache(cache: StepCacheSpec, plan: ParallelPlan) -> None:
    """Raise UnsupportedError if the method reuses activations that a skipped step would lack."""
    if cache.skips_whole_steps:
        if plan.begins_next_step:
            raise UnsupportedError(
                f"step_cache={cache} is not available with {plan.begins_next_step}, or leave out "
                "--step_cache."
            )
    elif plan.reads_previous_step and not (plan.follows_step_cache and cache.is_regular):
        raise UnsupportedError(
            f"step_cache={cache} is not available with {plan.reads_previous_step}, or leave out "
            "--step_cache."
        )

"""Scheduler settings that a request may change, and their bounds. Imports no torch.

A request may change how a sampler works. Only the operator, with --scheduler, may set what the
model was trained with (noise levels, prediction type) and what decides a scheduler's memory.
"""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Switch = bool | None
Shift = Annotated[float | None, Field(ge=0.01, le=100)]
AttentionShift = Annotated[float | None, Field(ge=0, le=10)]


class RequestedSettings(BaseModel):
    """Settings allowed in requests, in diffusers' names. None means not given."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    use_karras_sigmas: Switch = None
    use_exponential_sigmas: Switch = None
    use_beta_sigmas: Switch = None
    use_lu_lambdas: Switch = None
    rescale_betas_zero_snr: Switch = None
    set_alpha_to_one: Switch = None
    euler_at_final: Switch = None
    stochastic_sampling: Switch = None
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    steps_offset: Annotated[int | None, Field(ge=0, le=1)] = None
    final_sigmas_type: Literal["zero", "sigma_min"] | None = None
    interpolation_type: Literal["linear", "log_linear"] | None = None
    solver_order: Annotated[int | None, Field(ge=1, le=3)] = None
    solver_type: Literal["midpoint", "heun", "bh2", "logrho"] | None = None
    algorithm_type: Literal["dpmsolver++", "sde-dpmsolver++", "deis"] | None = None
    variance_type: Literal["fixed_small", "fixed_small_log", "fixed_large"] | None = None
    disable_corrector: Annotated[
        list[Annotated[int, Field(ge=0, le=1000)]] | None, Field(max_length=1000)
    ] = None
    shift: Shift = None
    flow_shift: Shift = None
    base_shift: AttentionShift = None
    max_shift: AttentionShift = None


OF_REQUESTS = tuple(RequestedSettings.model_fields)
OF_OPERATORS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "prediction_type", "timestep_type",
    "timestep_scaling", "sigma_min", "sigma_max", "lambda_min_clipped", "clip_sample",
    "clip_sample_range", "thresholding",
    "dynamic_thresholding_ratio", "sample_max_value", "use_dynamic_shifting", "base_image_seq_len",
    "max_image_seq_len",
    "shift_terminal", "invert_sigmas", "time_shift_type", "use_flow_sigmas",
    "original_inference_steps", "noise_sampler_seed",
    "skip_prk_steps", "predict_x0", "lower_order_final", "solver_p", "scale_factors",
    "upscale_mode",
)  # fmt: skip
"""Further scheduler settings, allowed in --scheduler only."""


def why_unknown(names: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the first name that no scheduler has; None if all are known."""
    known = (*OF_REQUESTS, *OF_OPERATORS)
    for name in names:
        if name not in known:
            closest = difflib.get_close_matches(str(name)[:80], known, n=1)
            advice = f"Did you mean {closest[0]!r}?" if closest else "Leave it out."
            return (
                f"scheduler setting {str(name)[:80]!r} is not a setting of any scheduler. "
                f"{advice} Allowed in requests: {_allowed()}."
            )
    return None


def why_refused(overrides: Mapping[str, Any]) -> str | None:
    """Return why the first setting is not allowed in a request; None if all are."""
    for name in overrides:
        if name in OF_OPERATORS:
            return (
                f"scheduler setting {name} is not for requests: it belongs to the model. Leave it "
                f"out, or start the host with it in --scheduler. Allowed in requests: {_allowed()}."
            )
    try:
        RequestedSettings.model_validate(overrides)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        given = repr(first["input"])[:80]
        return f"scheduler setting {first['loc'][0]}={given} is not allowed: {first['msg']}."
    return None


def _allowed() -> str:
    return ", ".join(OF_REQUESTS)

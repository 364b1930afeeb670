"""Scheduler settings: which ones a request may change, their bounds, and which ones describe the
model. Imports no torch.

A request may change how a sampler works. Only the operator, with --scheduler, may set what the
model was trained with (noise levels, prediction type) and what decides a scheduler's memory.
"""

import difflib
import importlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from backends.errors import RequestError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

MAX_SHOWN = 80
"""Characters of a value shown in a message."""
MAX_TEXT = 20_000
"""Most characters of a scheduler given as text."""
Switch = bool | None
Shift = Annotated[float | None, Field(ge=0.01, le=100)]
AttentionShift = Annotated[float | None, Field(ge=0, le=10)]
Positive = Annotated[float | None, Field(gt=0, le=1e6)]
NotNegative = Annotated[float | None, Field(ge=0, le=1e6)]
NotNegativeInteger = Annotated[int | None, Field(ge=0, lt=2**63)]
Length = Annotated[int | None, Field(ge=1, le=10**6)]


class SchedulerError(RequestError):
    """A scheduler that is unknown or cannot be used. At launch, raise it again as ConfigError."""

    def __init__(self, message: str) -> None:
        super().__init__(message, field="scheduler")


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


class LaunchSettings(RequestedSettings):
    """Settings allowed in --scheduler: the model's own facts, too."""

    num_train_timesteps: Annotated[int | None, Field(ge=1, le=100_000)] = None
    beta_start: Annotated[float | None, Field(gt=0, lt=1)] = None
    beta_end: Annotated[float | None, Field(gt=0, lt=1)] = None
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = None
    trained_betas: Annotated[
        list[Annotated[float, Field(ge=0, le=1)]] | None, Field(min_length=1, max_length=100_000)
    ] = None
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] | None = None
    timestep_type: Literal["discrete", "continuous"] | None = None
    timestep_scaling: Positive = None
    sigma_min: NotNegative = None
    sigma_max: Positive = None
    lambda_min_clipped: float | None = None
    clip_sample: Switch = None
    clip_sample_range: Positive = None
    thresholding: Switch = None
    dynamic_thresholding_ratio: Annotated[float | None, Field(gt=0, le=1)] = None
    sample_max_value: Positive = None
    use_dynamic_shifting: Switch = None
    base_image_seq_len: Length = None
    max_image_seq_len: Length = None
    shift_terminal: Annotated[float | None, Field(ge=0, lt=1)] = None
    invert_sigmas: Switch = None
    time_shift_type: Literal["exponential", "linear"] | None = None
    use_flow_sigmas: Switch = None
    original_inference_steps: Length = None
    noise_sampler_seed: NotNegativeInteger = None
    skip_prk_steps: Switch = None
    predict_x0: Switch = None
    lower_order_final: Switch = None
    solver_p: None = None
    scale_factors: Annotated[
        list[Annotated[float, Field(gt=0, le=100)]] | None, Field(max_length=1000)
    ] = None
    upscale_mode: (
        Literal["nearest", "linear", "bilinear", "bicubic", "trilinear", "area", "nearest-exact"]
        | None
    ) = None


OTHER_NAMES = dict.fromkeys(("name", "sampler", "sampler_name", "type"), "scheduler")
"""Names that clients have for the sampler's own."""
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")
SIGMA_FLAGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
SHIFTED = frozenset({"CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"})
"""Classes that shift the noise levels by a setting of their own, snr_shift_scale."""
NOISE_FIELDS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
SAMPLE_FIELDS = (
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
)
SPACING_FIELDS = ("timestep_spacing", "steps_offset", "set_alpha_to_one", *SIGMA_FLAGS)
FLOW_FIELDS = (
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "shift_terminal",
)
FLOW_FIELDS += ("invert_sigmas", "time_shift_type")
MODEL_FIELDS = (*NOISE_FIELDS, "prediction_type", *SAMPLE_FIELDS, *SPACING_FIELDS, *FLOW_FIELDS)
"""Config fields that describe the model. Only they are copied from the checkpoint's scheduler to
one of another class.

The others belong to one solver and break another: algorithm_type="sde-dpmsolver++" raises in DEIS,
svd's sigma_max=700 gives NaN.
"""
DESCRIBED = (
    frozenset(
        {
            "DDIMParallelScheduler",
            "DDPMParallelScheduler",
            "LTXEulerAncestralRFScheduler",
            "SASolverScheduler",
        }
    )
    | SHIFTED
)
"""Classes that only checkpoints name, whose MODEL_FIELDS tell another class all about the model."""

OF_REQUESTS = tuple(RequestedSettings.model_fields)
OF_OPERATORS = tuple(name for name in LaunchSettings.model_fields if name not in OF_REQUESTS)
"""Further scheduler settings, allowed in --scheduler only."""
ALGORITHMS = {
    "DEISMultistepScheduler": ("deis", "dpmsolver++"),
    "DPMSolverMultistepScheduler": ("dpmsolver++", "sde-dpmsolver++"),
    "DPMSolverSinglestepScheduler": ("dpmsolver++", "sde-dpmsolver++"),
}
"""Class -> the values of algorithm_type that it takes."""


def settings_from(value: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a scheduler's name and settings, given as such, as JSON or as a name alone."""
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise SchedulerError(
            f"scheduler has {len(value)} characters. Allowed: {MAX_TEXT}. Give a name, and the "
            "settings that differ."
        )
    text = value.strip() if isinstance(value, str) else value
    if not isinstance(text, str) or not text.startswith(("{", "[", '"')):
        return {"scheduler": text}
    try:
        decoded = json.loads(text)
    except (ValueError, RecursionError) as error:  # numbers too long or lists nested too deeply
        raise SchedulerError(
            f"scheduler={shown(text)} is not valid JSON: {error}. Give a name, or JSON such as "
            f'{{"scheduler": "euler"}}.'
        ) from error
    return dict(decoded) if isinstance(decoded, dict) else {"scheduler": decoded}


def shown(value: Any) -> str:
    """Return the start of a value's repr, for a message."""
    try:
        return repr(value)[:MAX_SHOWN]
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} that is too deep or too long"


def plain_setting(name: str, value: Any) -> Any:
    """Return a number or word as its field has it, however it is written: 2.0, "Trailing"."""
    field = LaunchSettings.model_fields.get(name)
    declared = field.annotation if field is not None else None
    if int in get_args(declared) and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and f"'{value.strip().lower()}'" in str(declared):
        return value.strip().lower()
    return value


def model_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the checkpoint's scheduler config that describe the model."""
    # Defaults of the checkpoint's class are no settings of the checkpoint. Its noise levels are:
    # LCM and TCD begin from others than Euler.
    implicit = set(config.get("_use_default_values", ())) - set(NOISE_FIELDS)
    carried = {key: config[key] for key in MODEL_FIELDS if key in config and key not in implicit}
    # DDIM, DDPM, LCM and TCD clip the clean sample to [-1, 1] by default; latents exceed that
    return {"clip_sample": False} | carried | _shifted_noise(config) | _flow_shift(config)


def _shifted_noise(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the noise levels of a class that shifts them, as `trained_betas`, which all others
    take. rescale_betas_zero_snr stays a setting: the shift comes before it in either class.
    """
    class_name = config["_class_name"]
    if class_name not in SHIFTED:
        return {}
    fields = {name: value for name, value in config.items() if not name.startswith("_")}
    own = _diffusers_class(class_name)(**fields | {"rescale_betas_zero_snr": False})
    # these classes have clip_sample, on by default, and never read it
    return {"trained_betas": _betas_of(own), "clip_sample": False}


def _flow_shift(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shift of a flow-matching model, which half of the classes call flow_shift."""
    is_other = "shift" not in config and config.get("use_flow_sigmas")
    return {"shift": config["flow_shift"]} if is_other and "flow_shift" in config else {}


def rescaled_noise(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the noise levels that rescale_betas_zero_snr leads to, as `trained_betas`, for a class
    without that setting.

    diffusers' DPM++ computes them, with a last level that can be divided by.
    """
    levels = {name: fields[name] for name in NOISE_FIELDS if name in fields}
    rescaled = _diffusers_class("DPMSolverMultistepScheduler")(
        **levels | {"rescale_betas_zero_snr": True}
    )
    return {"trained_betas": _betas_of(rescaled)}


def _betas_of(scheduler: "SchedulerMixin") -> list[float]:
    kept = scheduler.alphas_cumprod.double()
    return [1 - kept[0].item(), *(1 - kept[1:] / kept[:-1]).tolist()]


def _diffusers_class(name: str) -> "type[SchedulerMixin]":
    return getattr(importlib.import_module("diffusers"), name)


def why_wrong(overrides: Mapping[str, Any], *, has_name: bool) -> str | None:
    """Return what is wrong with settings that no scheduler has, or that exclude each other; None if
    nothing is. has_name: whether the sampler has a name besides.
    """
    known = (*OF_REQUESTS, *OF_OPERATORS)
    for name in overrides:
        if name not in known:
            closest = difflib.get_close_matches(str(name)[:80], known, n=1)
            if name in OTHER_NAMES:
                closest = [] if has_name else [OTHER_NAMES[name]]
            advice = f"Did you mean {closest[0]!r}?" if closest else "Leave it out."
            return (
                f"scheduler setting {str(name)[:80]!r} is not a setting of any scheduler. "
                f"{advice} Allowed in requests: {_allowed()}."
            )
    for key in (*SIGMA_FLAGS, "rescale_betas_zero_snr"):
        if not isinstance(overrides.get(key, False), bool):
            return (
                f"scheduler setting {key}={overrides[key]!r} is not allowed. Allowed: true, false."
            )
    chosen = [flag for flag in SIGMA_FLAGS if overrides.get(flag)]
    if len(chosen) > 1:
        return f"scheduler settings {' and '.join(chosen)} exclude each other. Set one of them."
    spacing = overrides.get("timestep_spacing", "leading")
    if spacing not in TIMESTEP_SPACINGS:
        return (
            f"scheduler setting timestep_spacing={spacing!r} is not allowed. Allowed: "
            f"{', '.join(TIMESTEP_SPACINGS)}."
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
    return _first_problem(RequestedSettings, overrides)


def why_not_at_launch(overrides: Mapping[str, Any], class_name: str | None) -> str | None:
    """Return why the first setting is not allowed in --scheduler; None if all are.

    class_name: of the scheduler, if a name was given.
    """
    algorithm = overrides.get("algorithm_type")
    allowed = ALGORITHMS.get(class_name or "", (algorithm,))
    if algorithm not in (None, *allowed):
        return (
            f"scheduler setting algorithm_type={str(algorithm)[:80]!r} is not allowed with "
            f"{class_name}. Allowed: {', '.join(allowed)}."
        )
    return _first_problem(LaunchSettings, overrides)


def _first_problem(model: type[BaseModel], overrides: Mapping[str, Any]) -> str | None:
    try:
        model.model_validate(overrides)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        given = repr(first["input"])[:80]
        return f"scheduler setting {first['loc'][0]}={given} is not allowed: {first['msg']}."
    return None


def _allowed() -> str:
    return ", ".join(OF_REQUESTS)

"""A1111's names of samplers and schedules, and the schedulers that they mean."""

import difflib
from collections.abc import Mapping
from typing import Any

from backends.errors import RequestError, UnsupportedError
from backends.generation.schedulers import SCHEDULERS, SampledModel
from backends.model_table import ModelSpec
from hosts.http.dialect import is_empty, shown

LABELS = {
    "DPM++ 2M": "dpmpp_2m",
    "DPM++ SDE": "dpmpp_sde",
    "DPM++ 2M SDE": "dpmpp_2m_sde",
    "Euler a": "euler_a",
    "Euler": "euler",
    "LMS": "lms",
    "Heun": "heun",
    "DPM2": "dpm_2",
    "DPM2 a": "dpm_2_a",
    "DPM SDE": "dpm_sde",
    "DDIM": "ddim",
    "DDPM": "ddpm",
    "PLMS": "pndm",
    "UniPC": "unipc",
    "LCM": "lcm",
    "TCD": "tcd",
    "DEIS": "deis",
    "IPNDM": "ipndm",
}
FLOW_LABELS = {"Euler": "fm_euler", "Heun": "fm_heun", "LCM": "fm_lcm"}
"""Names that flow-matching models have for the same samplers."""
SAMPLER = ("sampler_name", "sampler_index", "sampler")
SCHEDULES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("automatic", "uniform", "normal", "simple")},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "sgm uniform": {"timestep_spacing": "trailing"},
}
SCHEDULE_LABELS = {
    "automatic": "Automatic",
    "uniform": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "sgm uniform": "SGM Uniform",
    "simple": "Simple",
    "normal": "Normal",
    "beta": "Beta",
}
ALIASES = {"sgm_uniform": "sgm uniform", "sgmuniform": "sgm uniform"}
ENDINGS = (" karras", "_karras", " exponential", " sgmuniform", " sgm uniform")
"""Suffixes by which older clients add a schedule to a sampler's name."""
FIXED_SIGMAS = frozenset({"ddim", "ddpm", "pndm", "euler_a", "lcm", "tcd", "ipndm"})
"""Schedulers whose noise levels have one fixed curve."""


def labels(spec: ModelSpec) -> dict[str, str]:
    """Return label -> scheduler for the samplers that a model takes."""
    usable = set(SampledModel.by(spec).samplers)
    return {label: name for label, name in LABELS.items() if name in usable}


def scheduler_of(
    body: Mapping[str, Any], spec: ModelSpec, *, sent_as: Mapping[str, str] | None = None
) -> dict[str, Any] | None:
    """Return the scheduler with its settings, or None for the model's default.

    sent_as: field -> the name by which it was sent.
    """
    names = sent_as or {}
    key = next((key for key in SAMPLER if not is_empty(body.get(key))), SAMPLER[0])
    named, field = "" if is_empty(body.get(key)) else body[key], names.get(key, key)
    if not isinstance(named, str):
        raise RequestError(f"{field}={shown(named)} is not a name. Send text.", field=field)
    name, ending = _split(named.strip().lower())
    schedule, curve_field = body.get("scheduler"), names.get("scheduler", "scheduler")
    curve = _schedule(schedule if not is_empty(schedule) else "automatic", curve_field)
    curve = curve or _schedule(ending or "automatic", field)
    model = SampledModel.by(spec)
    sampler = _sampler(name, named, field, model) if name not in ("", "automatic") else None
    is_fixed = sampler in FIXED_SIGMAS and any(each.endswith("_sigmas") for each in curve)
    if is_fixed or not all(model.has_setting(sampler, each) for each in curve):
        given = (
            f"{field}={shown(named)}" if is_empty(schedule) else f"{curve_field}={shown(schedule)}"
        )
        own = model.own.get("_class_name") or "the sampler"
        raise UnsupportedError(
            f"{given} is not available with {named if sampler else f'{own} of this model'}. Send "
            "Automatic.",
            field=field if is_empty(schedule) else curve_field,
        )
    if sampler is None and not curve:
        return None
    return {**({"scheduler": sampler} if sampler else {}), **curve}


def label_of(name: str) -> str:
    """Return the label of a scheduler, or its name if it has no label."""
    return next((label for label, each in {**LABELS, **FLOW_LABELS}.items() if each == name), name)


def _split(name: str) -> tuple[str, str]:
    """Split 'dpm++ 2m karras' into ('dpm++ 2m', 'karras')."""
    for ending in ENDINGS:
        if name.endswith(ending):
            return name.removesuffix(ending), ending.strip(" _")
    return name, ""


def _sampler(name: str, given: str, field: str, model: SampledModel) -> str:
    by_label = {label.lower(): sampler for label, sampler in LABELS.items()}
    plain = name.removeprefix("k_").replace("++", "pp").replace(" ", "_")
    found = by_label.get(name) or (plain if plain in SCHEDULERS else None)
    usable = model.samplers if found is None or model.why_not(found) else ()
    allowed = ", ".join(label for label, sampler in LABELS.items() if sampler in usable)
    if found is None:
        close = difflib.get_close_matches(name, by_label, n=1, cutoff=0.0)[0]
        nearest = next(label for label in LABELS if label.lower() == close)
        raise RequestError(
            f"{field}={shown(given)} is not a sampler here. The nearest one is {nearest}. "
            f"Allowed: {allowed}.",
            field=field,
        )
    if reason := model.why_not(found):
        advice = f"Allowed: {allowed}" if allowed else "Leave it out"
        raise RequestError(f"{field}={shown(given)} {reason}. {advice}.", field=field)
    return found


def _schedule(value: Any, field: str) -> dict[str, Any]:
    name = value.strip().lower() if isinstance(value, str) else None
    name = ALIASES.get(name or "", name)
    if name == "":
        return {}
    if name not in SCHEDULES:
        raise RequestError(
            f"{field}={shown(value)} is not a schedule here. Allowed: "
            f"{', '.join(SCHEDULE_LABELS.values())}.",
            field=field,
        )
    return SCHEDULES[name]

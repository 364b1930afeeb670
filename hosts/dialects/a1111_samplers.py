"""A1111's names of samplers and schedules, and the schedulers that they mean."""

import difflib
from collections.abc import Mapping
from typing import Any

from backends.errors import RequestError, UnsupportedError
from backends.generation.schedulers import SCHEDULERS, has_setting
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
"""The same for flow-matching models."""
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


def labels(*, flow: bool) -> dict[str, str]:
    """Return label -> scheduler for the models of one family."""
    if flow:
        return FLOW_LABELS
    return {label: name for label, name in LABELS.items() if not SCHEDULERS[name].flow}


def scheduler_of(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the scheduler with its settings, or None for the model's default."""
    named = next(
        (body[key] for key in ("sampler_name", "sampler_index") if not is_empty(body.get(key))), ""
    )
    if not isinstance(named, str):
        raise RequestError(
            f"sampler_name={shown(named)} is not a name. Send text.", field="sampler_name"
        )
    name, ending = _split(named.strip().lower())
    schedule = body.get("scheduler")
    curve = _schedule(schedule if not is_empty(schedule) else "automatic")
    curve = curve or _schedule(ending or "automatic")
    sampler = _sampler(name, named) if name not in ("", "automatic") else None
    if (sampler in FIXED_SIGMAS and any(key.endswith("_sigmas") for key in curve)) or not (
        sampler is None or all(has_setting(sampler, key, flow=False) for key in curve)
    ):
        raise UnsupportedError(
            f"scheduler={shown(schedule or ending)} is not available with {named}. Send Automatic."
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


def _sampler(name: str, given: str) -> str:
    by_label = {label.lower(): sampler for label, sampler in LABELS.items()}
    plain = name.removeprefix("k_").replace("++", "pp").replace(" ", "_")
    found = by_label.get(name) or (plain if plain in SCHEDULERS else None)
    if found is None:
        close = difflib.get_close_matches(name, by_label, n=1, cutoff=0.0)[0]
        nearest = next(label for label in LABELS if label.lower() == close)
        raise RequestError(
            f"sampler_name={shown(given)} is not a sampler here. The nearest one is {nearest}. "
            f"Allowed: {', '.join(LABELS)}.",
            field="sampler_name",
        )
    return found


def _schedule(value: Any) -> dict[str, Any]:
    name = value.strip().lower() if isinstance(value, str) else None
    name = ALIASES.get(name or "", name)
    if name == "":
        return {}
    if name not in SCHEDULES:
        raise RequestError(
            f"scheduler={shown(value)} is not a schedule here. Allowed: "
            f"{', '.join(SCHEDULE_LABELS.values())}.",
            field="scheduler",
        )
    return SCHEDULES[name]

"""Image facts in A1111's responses: `info`, and the text that image viewers read from a PNG."""

import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from backends.request import GenerateResult
from hosts.dialects.a1111_fields import Asked
from hosts.dialects.a1111_samplers import SCHEDULE_LABELS, label_of
from hosts.http import VERSION
from hosts.http.jobs_api import notes_of

_SETTING = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
"""One setting of the last line of an infotext."""


def info(
    body: Mapping[str, Any], asked: Asked, results: Sequence[GenerateResult], *, model: str
) -> dict[str, Any]:
    """Return the facts about all images: A1111's names first, then our remaining ones."""
    first, seeds = results[0], [result.seed for result in results]
    prompt, negative = str(body.get("prompt") or ""), str(body.get("negative_prompt") or "")
    return {
        **first.resolved,
        "prompt": prompt,
        "all_prompts": [prompt] * len(results),
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * len(results),
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": -1,
        "all_subseeds": [-1] * len(results),
        "subseed_strength": 0,
        "width": first.frames.shape[2],
        "height": first.frames.shape[1],
        "sampler_name": _sampler(asked, first),
        "cfg_scale": _cfg_scale(asked, first),
        "steps": first.resolved.get("num_inference_steps"),
        "batch_size": asked.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": model,
        "sd_model_hash": "",
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": _strength(asked),
        "extra_generation_params": asked.facts,
        "index_of_first_image": 0,
        "infotexts": [infotext(body, asked, result, model=model) for result in results],
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "clip_skip": 1 + int(asked.fields.get("clip_skip") or 0),
        "is_using_inpainting_conditioning": False,
        "version": VERSION,
        "notes": [*asked.notes, *notes_of(first.report)],
    }


def infotext(body: Mapping[str, Any], asked: Asked, result: GenerateResult, *, model: str) -> str:
    """Return the settings of one image as A1111 writes them into a PNG."""
    facts = {
        "Steps": result.resolved.get("num_inference_steps"),
        "Sampler": _sampler(asked, result),
        "Schedule type": _schedule(asked),
        "CFG scale": _cfg_scale(asked, result),
        "Guidance scale": result.resolved.get("guidance_scale") if asked.above_scale else None,
        "Seed": result.seed,
        "Size": f"{result.frames.shape[2]}x{result.frames.shape[1]}",
        "Model": model,
        "Denoising strength": _strength(asked),
        "Clip skip": 1 + asked.fields["clip_skip"] if "clip_skip" in asked.fields else None,
        **asked.facts,
        "Version": f"diffusion-launcher {VERSION}",
    }
    lines = [str(body.get("prompt") or "")]
    if body.get("negative_prompt"):
        lines.append(f"Negative prompt: {body['negative_prompt']}")
    settings = (f"{name}: {_quoted(value)}" for name, value in facts.items() if value is not None)
    return "\n".join([*lines, ", ".join(settings)])


def read_infotext(text: str) -> dict[str, str]:
    """Return the settings of an infotext by name, with the prompts and the two sides of sizes."""
    lines = text.strip().split("\n")
    settings = dict(_SETTING.findall(lines[-1])) if len(_SETTING.findall(lines[-1])) > 2 else {}
    if not settings:
        return {"Prompt": text} if text else {}
    prompt, _, negative = "\n".join(lines[:-1]).partition("Negative prompt:")
    found = {"Prompt": prompt.strip(), "Negative prompt": negative.strip()}
    for name, value in settings.items():
        plain = _unquoted(value)
        size = re.fullmatch(r"(\d+)x(\d+)", plain)
        found |= {f"{name}-1": size[1], f"{name}-2": size[2]} if size else {name: plain}
    return found


def _unquoted(value: str) -> str:
    try:
        return json.loads(value) if value.startswith('"') else value
    except ValueError:
        return value


def _sampler(asked: Asked, result: GenerateResult) -> str:
    named = asked.fields.get("scheduler") or {}
    return label_of(named.get("scheduler") or str(result.resolved.get("scheduler") or ""))


def _schedule(asked: Asked) -> str:
    settings = asked.fields.get("scheduler") or {}
    if settings.get("timestep_spacing") == "trailing":
        return SCHEDULE_LABELS["sgm uniform"]
    curve = next((name for name in settings if name.startswith("use_")), "use_automatic_sigmas")
    return SCHEDULE_LABELS[curve.split("_")[1]]


def _cfg_scale(asked: Asked, result: GenerateResult) -> float | None:
    """Return the guidance as A1111 counts it."""
    own = result.resolved.get("guidance_scale")
    return own + asked.above_scale if own is not None and asked.above_scale else own


def _strength(asked: Asked) -> Any:
    has_start = any(name in asked.fields for name in ("init_image", "image"))
    return asked.fields.get("strength") if has_start else None


def _quoted(value: Any) -> str:
    """Quote text with a comma, colon or line break, at which readers split."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text

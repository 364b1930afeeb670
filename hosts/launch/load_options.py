"""Settings -> the part of the load request on quantising, compiling and memory. Imports no
torch.
"""

from typing import Any

from backends.errors import ConfigError
from backends.model_table import ModelSpec
from backends.plan import ParallelPlan
from backends.quantization_spec import QuantizationSpec, parse_quantization
from backends.request import CompileSettings
from backends.step_cache_spec import StepCacheSpec, parse_step_cache
from hosts.launch.settings import Settings

OFFLOADS = {
    "enable_model_cpu_offload": "model",
    "enable_sequential_cpu_offload": "sequential",
    "enable_group_offload": "group",
}
WITHOUT_SDPA = ("enable_attention_slicing", "xformers_efficient")
"""Options that replace the attention operator through which some backends see the other ranks'
tokens.
"""


def treatments(
    settings: Settings, *, plan: ParallelPlan, reasons: list[str], num_gpus: int
) -> dict[str, Any]:
    """Fields of LoadRequest. Adds a sentence to `reasons` for each value that was chosen or has no
    effect. ConfigError for what clashes.
    """
    compile_settings = _compile(settings, reasons)
    prewarm_steps = settings.warm_up_steps or 0
    if compile_settings is not None and not prewarm_steps:
        prewarm_steps = 1
        reasons.append(
            "warm_up_steps=1: compiling happens in the first image, so one is made before the host "
            "is ready"
        )
    if plan.needs_prewarm and settings.warm_up_steps is None and not prewarm_steps:
        prewarm_steps = 1
        reasons.append(
            f"warm_up_steps=1: {plan.needs_prewarm}, so one is made before the host is ready"
        )
    return {
        "quantize": _quantize(settings, reasons),
        "compile": compile_settings,
        "offload": _offload(settings, reasons, num_gpus=num_gpus),
        "prewarm_steps": prewarm_steps,
        **{name: _lean_attention(settings, name, plan, reasons) for name in WITHOUT_SDPA},
    }


def step_cache(
    settings: Settings, spec: ModelSpec, *, plan: ParallelPlan, reasons: list[str]
) -> StepCacheSpec | None:
    """What --step_cache asks for, or else the method's own options."""
    if settings.step_cache is not None:
        cache = parse_step_cache(settings.step_cache, spec)
        reasons.append(
            f"results are approximate: step_cache={cache} skips steps; a request with "
            "quality=exact skips none"
        )
        return cache
    return parse_step_cache(plan.step_cache, spec) if plan.step_cache else None


def _quantize(settings: Settings, reasons: list[str]) -> dict[str, QuantizationSpec]:
    """Group of components -> how. The split forms win over quantize_to."""
    chosen = {
        "denoiser": ("quantize_unet_to", settings.quantize_unet_to),
        "encoders": ("quantize_encoder_to", settings.quantize_encoder_to),
        "misc": ("quantize_misc_to", settings.quantize_misc_to),
        "vae": ("quantize_vae", settings.quantize_vae),
    }
    if settings.quantize_to is not None:
        for group in ("denoiser", "encoders"):
            if chosen[group][1] is None:
                chosen[group] = ("quantize_to", settings.quantize_to)
    if settings.gguf_model is not None and chosen["denoiser"][1] is not None:
        raise ConfigError(
            f"--gguf_model and --{chosen['denoiser'][0]} were given, and both quantise the "
            "denoiser. Give one of them."
        )
    for name in ("quantize_tokenizer", "quantize_scheduler"):
        if getattr(settings, name) is not None:
            reasons.append(f"--{name} has no effect: there are no weights in it")
    return {
        group: parse_quantization(text, option=option)
        for group, (option, text) in chosen.items()
        if text is not None
    }


def _compile(settings: Settings, reasons: list[str]) -> CompileSettings | None:
    wanted = {
        "denoiser": settings.compile_unet,
        "vae": settings.compile_vae,
        "encoders": settings.compile_text_encoder,
    }
    targets = tuple(target for target, is_wanted in wanted.items() if is_wanted)
    if not targets:
        return None
    if settings.compile_mode is not None and settings.compile_options:
        reasons.append(
            "--compile_mode has no effect: --compile_options was given too, and torch takes one of "
            "them"
        )
    return CompileSettings(
        targets=targets,
        backend=settings.compile_backend,
        mode=settings.compile_mode,
        options=settings.compile_options,
        fullgraph=not settings.compile_fullgraph_off,
        cache_limit=settings.torch_cache_limit,
        accumulated_cache_limit=settings.torch_accumulated_cache_limit,
        capture_scalar=settings.torch_capture_scalar,
    )


def _offload(settings: Settings, reasons: list[str], *, num_gpus: int) -> str | None:
    wanted = [name for name in OFFLOADS if getattr(settings, name)]
    if len(wanted) > 1:
        raise ConfigError(
            f"--{' and --'.join(wanted)} were given, and only one of them can be. Leave the others "
            "out."
        )
    if wanted and not num_gpus:
        reasons.append(
            f"--{wanted[0]} has no effect: there is no GPU, so all weights are in main memory"
        )
    return OFFLOADS[wanted[0]] if wanted else None


def _lean_attention(settings: Settings, name: str, plan: ParallelPlan, reasons: list[str]) -> bool:
    """Not refused where it cannot be: it changes no image, and existing clients send it to every
    backend.
    """
    if not getattr(settings, name) or not plan.intercepts_sdpa:
        return getattr(settings, name)
    reasons.append(
        f"--{name} has no effect: backend {plan.method!r} reaches the other ranks through torch's "
        "own attention"
    )
    return False

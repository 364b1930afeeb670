"""Settings -> the parts of the load request on quantization, compiling, memory and step caches.
Imports no torch.

Values and the reasons for them are separate functions: a reason says what was chosen, or which
argument has no effect.
"""

from collections.abc import Iterator

from backends.errors import ConfigError
from backends.model_table import ModelSpec
from backends.plan import ParallelPlan
from backends.quantization_spec import QuantizationSpec, parse_quantization
from backends.request import CompileSettings
from backends.step_cache_spec import StepCacheSpec, parse_step_cache
from hosts.launch.settings import Settings, options

OFFLOADS = {
    "enable_model_cpu_offload": "model",
    "enable_sequential_cpu_offload": "sequential",
    "enable_group_offload": "group",
}
WITHOUT_SDPA = ("enable_attention_slicing", "xformers_efficient")
"""Options that replace the attention operator in which some backends reach the other ranks'
tokens.
"""
SEES_OPERATORS = ("distrifuser", "xdit")

FEATURE_OPTIONS = {
    "lora": ("lora", "lora_dir", "motion_adapter_lora"),
    "controlnet": ("control_net",),
    "ip_adapter": ("ip_adapter",),
    "gguf": ("gguf_model",),
    "quantization": (
        "quantize_to",
        "quantize_unet_to",
        "quantize_encoder_to",
        "quantize_misc_to",
        "quantize_vae",
    ),
    "compile": ("compile_unet", "compile_vae", "compile_text_encoder"),
    "offload": (
        "enable_model_cpu_offload",
        "enable_sequential_cpu_offload",
        "enable_group_offload",
    ),
    "compel": ("compel",),
    "step_cache": ("step_cache",),
}
"""Feature of the model table -> the options that ask for it."""
MOTION_OPTIONS = ("motion_adapter", "motion_module", "motion_config", "motion_adapter_lora")


def asked_prewarm_steps(settings: Settings) -> int | None:
    """--prewarm_steps, or --warm_up_steps by its older name."""
    if settings.prewarm_steps is not None:
        return settings.prewarm_steps
    return settings.warm_up_steps


def prewarm_steps(settings: Settings, backend: str) -> tuple[int, str]:
    """Steps of the throw-away image after loading, and why if nobody asked for them."""
    asked = asked_prewarm_steps(settings)
    if compile_settings(settings) is not None and not asked:
        return 1, (
            "prewarm_steps=1: the first image compiles the model, so one is generated before the "
            "host is ready"
        )
    if backend == "asyncdiff" and asked is None:
        return 1, (
            "prewarm_steps=1: the first image finds and times the denoiser's units, so one is "
            "generated before the host is ready"
        )
    return asked or 0, ""


def step_cache(settings: Settings, spec: ModelSpec, *, backend: str) -> StepCacheSpec | None:
    """The cache of --step_cache, or of --use_fbcache where that can be had."""
    if settings.step_cache is not None:
        return parse_step_cache(settings.step_cache, spec)
    is_old = settings.use_fbcache and backend == "xdit" and _can_use_fbcache(settings, spec)
    return parse_step_cache("first_block", spec) if is_old else None


def step_cache_reason(settings: Settings, spec: ModelSpec, *, backend: str) -> str:
    cache = step_cache(settings, spec, backend=backend)
    if settings.step_cache is not None:
        return (
            f"results are approximate: step_cache={cache} skips steps; a request with "
            "quality=exact skips none"
        )
    if cache is not None:
        return f"step_cache={cache}: the meaning of --use_fbcache; results are approximate"
    if settings.use_fbcache and backend == "xdit":
        return "--use_fbcache has no effect: it is for transformers without PipeFusion"
    return ""


def _can_use_fbcache(settings: Settings, spec: ModelSpec) -> bool:
    return spec.denoiser == "transformer" and (settings.pipefusion_parallel_degree or 1) == 1


def quantization(settings: Settings) -> dict[str, QuantizationSpec]:
    """Group of components -> how its weights are kept. The split forms win over quantize_to."""
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
            f"--gguf_model and --{chosen['denoiser'][0]} were given, and both quantize the "
            "denoiser. Give one of them."
        )
    return {
        group: parse_quantization(text, option=option)
        for group, (option, text) in chosen.items()
        if text is not None
    }


def compile_settings(settings: Settings) -> CompileSettings | None:
    """None where nothing is to be compiled."""
    wanted = {
        "denoiser": settings.compile_unet,
        "vae": settings.compile_vae,
        "encoders": settings.compile_text_encoder,
    }
    targets = tuple(target for target, is_wanted in wanted.items() if is_wanted)
    if not targets:
        return None
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


def offload(settings: Settings) -> str | None:
    """What is kept in main memory: 'model', 'sequential' or 'group'."""
    wanted = [name for name in OFFLOADS if getattr(settings, name)]
    if len(wanted) > 1:
        raise ConfigError(
            f"--{' and --'.join(wanted)} were given, and only one of them can be. Leave the others "
            "out."
        )
    return OFFLOADS[wanted[0]] if wanted else None


def can_replace_attention(backend: str) -> bool:
    """Whether WITHOUT_SDPA act. They change no image, and the existing clients send them to every
    backend, so they are not refused.
    """
    return backend not in SEES_OPERATORS


def load_reasons(
    settings: Settings, spec: ModelSpec, *, backend: str, num_gpus: int
) -> Iterator[str]:
    """A sentence for each value that was chosen here, and each argument without effect."""
    if reason := step_cache_reason(settings, spec, backend=backend):
        yield reason
    compiled = compile_settings(settings) is not None
    if compiled and settings.compile_mode is not None and settings.compile_options:
        yield (
            "--compile_mode has no effect: --compile_options was given too, and torch takes one of "
            "them"
        )
    if reason := prewarm_steps(settings, backend)[1]:
        yield reason
    if not num_gpus:
        for name in OFFLOADS:
            if getattr(settings, name):
                yield f"--{name} has no effect: there is no GPU, so all weights are in main memory"
    for name in WITHOUT_SDPA:
        if getattr(settings, name) and not can_replace_attention(backend):
            yield (
                f"--{name} has no effect: backend {backend!r} reaches the other ranks through "
                "torch's own attention"
            )


def idle_reasons(
    settings: Settings, spec: ModelSpec, backend: str, plan: ParallelPlan
) -> Iterator[str]:
    """A sentence for each given option that this launch does not use. The existing clients send
    those of all backends.
    """
    for name in MOTION_OPTIONS if "motion_adapter" not in spec.components else ():
        if name in settings.given:
            yield f"--{name} has no effect: type {spec.name!r} has no motion adapter"
    if settings.warmup_steps is not None and "warmup_steps" not in plan.options:
        yield "--warmup_steps has no effect: this plan uses no values of the previous step"
    for name in settings.given:
        readers = options()[name].backends
        if readers and backend not in readers:
            yield f"--{name} has no effect: it is for backend {' or '.join(readers)}"


def features_of(settings: Settings) -> tuple[str, ...]:
    """The features of the model table that the options ask for."""
    return tuple(
        feature
        for feature, names in FEATURE_OPTIONS.items()
        if any(name in settings.given for name in names)
    )

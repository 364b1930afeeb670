"""Settings -> the parts of the load request on quantization, compiling, memory and step caches.
Imports no torch.

Values and the reasons for them are separate functions: a reason says what was chosen, or which
argument has no effect.
"""

from collections.abc import Iterator

from backends.errors import ConfigError
from backends.generation.schedulers import SampledModel, parse_scheduler
from backends.model_table import ModelSpec
from backends.plan import ParallelPlan
from backends.quantization_spec import QuantizationSpec, parse_quantization
from backends.request import WITH_GRAPHS, CompileSettings
from backends.step_cache_spec import StepCacheSpec, parse_step_cache
from hosts.launch.option import require_inductor_options
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

COMPILED = ("compile_unet", "compile_vae", "compile_text_encoder")
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
    "compile": COMPILED,
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

DESCRIBING = {
    **dict.fromkeys(
        (
            "compile_backend",
            "compile_mode",
            "compile_options",
            "compile_fullgraph_off",
            "torch_cache_limit",
            "torch_accumulated_cache_limit",
            "torch_capture_scalar",
        ),
        COMPILED,
    ),
    "vae_config": ("vae",),
    "unet_config": ("unet",),
    "transformer_config": ("transformer",),
    "control_net_config": ("control_net",),
    "controlnet_scale": ("control_net",),
}
"""Option -> those that it belongs to."""


def asked_prewarm_steps(settings: Settings) -> int | None:
    """--prewarm_steps, or --warm_up_steps by its older name."""
    if settings.prewarm_steps is not None:
        return settings.prewarm_steps
    return settings.warm_up_steps


def require_whole_weights(settings: Settings, plan: ParallelPlan) -> None:
    """ConfigError for options that need weights whole of which each rank keeps only a part."""
    if not (setting := plan.splits_weights_by):
        return
    given = [name for name in OFFLOADS if getattr(settings, name)]
    why = "each rank keeps a part of the weights on its device"
    if not given and not plan.keeps_widths:
        packed = ("gguf_model", "quantize_unet_to", "quantize_to", "quantize_misc_to")
        given = [name for name in packed if getattr(settings, name) is not None]
        why = "packed weights cannot be cut"
    if not given and settings.ip_adapter and plan.degree("tensor") > 1:
        given, why = ["ip_adapter"], "the attention of an IP-Adapter cannot be cut"
    if given:
        raise ConfigError(
            f"--{given[0]} is not available with {setting}: {why}. Leave out one of them."
        )


def prewarm_steps(settings: Settings, plan: ParallelPlan) -> tuple[int, str]:
    """Steps of the throw-away image after loading, and why if nobody asked for them."""
    asked = asked_prewarm_steps(settings)
    if compile_settings(settings) is not None and not asked:
        reason = "the first image compiles the model"
    elif plan.needs_prewarm and asked is None:
        reason = plan.needs_prewarm
    else:
        return asked or 0, ""
    return 1, f"prewarm_steps=1: {reason}, so one is generated before the host is ready"


def step_cache(settings: Settings, spec: ModelSpec, plan: ParallelPlan) -> StepCacheSpec | None:
    """The cache of --step_cache, or else of the method's own options."""
    if settings.step_cache is not None and settings.quality == "exact":
        raise ConfigError(
            f"--step_cache={settings.step_cache} and --quality=exact were given, but a step cache "
            "gives approximate images. Leave one of them out."
        )
    asked = settings.step_cache or plan.step_cache
    return parse_step_cache(asked, spec) if asked else None


def step_cache_reason(settings: Settings, spec: ModelSpec, plan: ParallelPlan) -> str:
    if settings.step_cache is None:
        return ""
    return (
        f"results are approximate: step_cache={step_cache(settings, spec, plan)} skips steps; a "
        "request with quality=exact skips none"
    )


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
    if settings.compile_options and settings.compile_backend in (None, "inductor"):
        require_inductor_options(settings.compile_options)
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
            f"--{' and --'.join(wanted)} were given, but only one of them can be used. Leave the "
            "others out."
        )
    kind = OFFLOADS[wanted[0]] if wanted else None
    compiled = [name for name in COMPILED if getattr(settings, name)]
    if kind in ("sequential", "group") and compiled:
        raise ConfigError(
            f"--{wanted[0]} is not available with --{compiled[0]}: torch.compile cannot trace what "
            "moves single layers. Leave one of them out, or give --enable_model_cpu_offload."
        )
    return kind


def slices_attention(settings: Settings, plan: ParallelPlan) -> bool:
    """Slices change no image, so they are left out where attention needs torch's own operator, or
    diffusers would put them in the place of an IP-Adapter's attention.
    """
    return (
        settings.enable_attention_slicing and not plan.intercepts_sdpa and not settings.ip_adapter
    )


def load_reasons(
    settings: Settings, spec: ModelSpec, plan: ParallelPlan, *, num_gpus: int
) -> Iterator[str]:
    """A sentence for each value that was chosen here, and each argument without effect."""
    if reason := step_cache_reason(settings, spec, plan):
        yield reason
    compiled = compile_settings(settings) is not None
    if compiled and settings.compile_mode is not None and settings.compile_options:
        yield (
            "--compile_mode has no effect: --compile_options was given too, and torch takes one of "
            "them"
        )
    if compiled and settings.compile_mode in WITH_GRAPHS and not settings.compile_options:
        yield (
            f"--compile_mode={settings.compile_mode}: CUDA graphs are used where the denoiser "
            "alone is compiled, as a whole"
        )
    if reason := prewarm_steps(settings, plan)[1]:
        yield reason
    if not num_gpus:
        for name in OFFLOADS:
            if getattr(settings, name):
                yield f"--{name} has no effect: there is no GPU, so all weights are in main memory"
    for name in WITHOUT_SDPA:
        # not refused: it changes no image, and the existing clients send it to every backend
        if getattr(settings, name) and plan.intercepts_sdpa:
            yield (
                f"--{name} has no effect: backend {plan.method!r} reaches the other ranks through "
                "torch's own attention"
            )
    if settings.enable_attention_slicing and not plan.intercepts_sdpa and settings.ip_adapter:
        yield "--enable_attention_slicing has no effect: an IP-Adapter's attention is not sliced"


def idle_reasons(settings: Settings, spec: ModelSpec, plan: ParallelPlan) -> Iterator[str]:
    """A sentence for each given option that this launch does not use. The existing clients send
    those of all backends.
    """
    for name in MOTION_OPTIONS if "motion_adapter" not in spec.components else ():
        if name in settings.given:
            yield f"--{name} has no effect: type {spec.name!r} has no motion adapter"
    for name, whose in DESCRIBING.items():
        if name in settings.given and not any(each in settings.given for each in whose):
            yield f"--{name} has no effect: there is no --{' or --'.join(whose)}"
    if settings.warmup_steps is not None and not plan.reads_previous_step:
        yield "--warmup_steps has no effect: this plan uses no values of the previous step"
    if settings.prewarm_steps is not None and settings.warm_up_steps is not None:
        yield "--warm_up_steps has no effect: --prewarm_steps is its newer name"
    if settings.lora_dir is not None and settings.compile_unet:
        yield "--lora_dir has no effect: --compile_unet makes LoRAs part of the weights"
    if settings.master_port is not None:
        yield "--master_port has no effect: the ranks of a machine connect in a private folder"
    sampled, choice = SampledModel.by(spec), parse_scheduler(settings.scheduler)
    for name in sampled.idle_settings(choice):
        yield f"--scheduler: {name} has no effect with {choice.name or 'the checkpoint'}"
    for name in settings.given:
        readers = options()[name].backends
        if readers and plan.method not in readers:
            yield f"--{name} has no effect: it is for backend {' or '.join(readers)}"


def features_of(settings: Settings) -> tuple[str, ...]:
    """The features of the model table that the options ask for."""
    return tuple(
        feature
        for feature, names in FEATURE_OPTIONS.items()
        if any(name in settings.given for name in names)
    )

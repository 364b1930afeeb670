"""Settings + model table -> StartPlan: model type, backend, plan, number of ranks, load request.
Imports no torch.

The launcher resolves this before any process starts, and every rank again, with the same result.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from backends import planner
from backends.errors import ConfigError, HostError, RequestError
from backends.files.adapter_fit import foreign_loras, require_fit
from backends.files.checkpoint import (
    Checkpoint,
    configuration_folder,
    infer_type,
    open_checkpoint,
    sampler_config,
    with_article,
)
from backends.files.defaults import misfit_of, with_own_defaults, with_own_extent, with_own_sizes
from backends.files.fit import denoiser_channels, prediction_settings
from backends.files.generic import generic_spec, own_class
from backends.files.mask_channels import latent_channels, with_mask_inputs
from backends.generation.schedulers import SampledModel, parse_at_launch
from backends.model_table import GENERIC, ModelSpec, ModelTable
from backends.plan import FEW_STEPS, ParallelPlan, Quality, is_met, require_world_size
from backends.request import LoadRequest
from backends.step_cache_spec import require_step_cache
from hosts.launch.auto_backend import BackendChoice, Recall, estimate_work, resolve_backend
from hosts.launch.files import (
    NAMED_OPTIONS,
    PATH_OPTIONS,
    SCALED_PATHS,
    HubFiles,
    checkpoint_path,
    denoiser_files,
    existing_files,
    existing_path,
    locate_configuration,
    locate_names,
    require_components,
    upscaler_files,
)
from hosts.launch.gpus import default_variant
from hosts.launch.load_options import (
    compile_settings,
    features_of,
    idle_reasons,
    load_reasons,
    offload,
    prewarm_steps,
    quantization,
    require_whole_weights,
    slices_attention,
    step_cache,
)
from hosts.launch.methods import Methods
from hosts.launch.settings import Settings
from hosts.launch.sharding import decide_division, divided_groups
from hosts.launch.team_modes import Teams, batch_limit, choose_teams

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, slots=True, kw_only=True)
class StartPlan:
    """Everything that is decided before a process starts."""

    spec: ModelSpec
    plan: ParallelPlan
    """Of all ranks together."""
    load: LoadRequest
    weight_bytes: int
    """Of all its weights on one rank, about."""
    num_ranks: int
    """On this machine."""
    reasons: tuple[str, ...]
    """Why each automatic choice was made, and which arguments have no effect."""
    teams: Teams
    max_batch: int = 1
    """The most jobs that one rank may do in one batch."""
    auto: BackendChoice | None = None
    """The choice of --backend=auto."""
    hub: HubFiles = HubFiles()
    """What names on a hub mean here. While some files are missing, `load` has their outlines."""
    methods: Methods
    """What the ranks may attach, for each number of ranks that work together."""

    @property
    def job_plan(self) -> ParallelPlan:
        """The plan for a job that arrives alone."""
        return min(self.teams.plans.items())[1] if self.teams.mode == "throughput" else self.plan

    def facts(self) -> dict[str, Any]:
        """For --check --json and GET /settings."""
        return {
            "type": self.spec.name,
            "backend": self.job_plan.method,
            "exactness": "approximate"
            if self.load.step_cache is not None
            else self.job_plan.exactness,
            "ranks": self.plan.world_size,
            "axes": dict(self.job_plan.axes),
            **self.teams.facts(),
            "max_batch": self.max_batch,
            "options": {
                name: value for name, value in self.job_plan.options.items() if value is not None
            },
            "checkpoint": self.hub.named(self.load.checkpoint),
            **self.hub.facts(),
            "variant": self.load.variant,
            **self._defaults(),
            "reasons": [*self.reasons, *self.plan.reasons, *self.teams.reasons],
            **({"divided": list(self.load.divided)} if self.load.divided else {}),
            "encoder_placement": self.load.encoder_placement,
            **({"planner": self.auto.facts()} if self.auto is not None else {}),
        }

    def _defaults(self) -> dict[str, Any]:
        """Return what a request gets that says nothing else."""
        spec, load = self.spec, self.load
        is_video = spec.output == "video"
        return {
            "height": load.height or spec.height,
            "width": load.width or spec.width,
            "num_inference_steps": spec.num_inference_steps,
            "guidance_scale": spec.guidance_scale,
            "scheduler": (load.scheduler or {}).get("scheduler") or "the checkpoint's",
            **({"num_frames": spec.num_frames, "fps": spec.frames_per_s} if is_video else {}),
            "max_prompt_tokens": spec.max_prompt_tokens,
        }

    def fingerprint(self, settings: Settings) -> dict[str, str]:
        """Return what must be the same on all machines of one host, by argument."""
        own = {
            "--nnodes": settings.nnodes,
            "--nproc_per_node": self.num_ranks,
            "--mode": settings.mode,
            "the plan": self.plan.describe(),
        }
        return {
            name: self.hub.named(str(value))
            for name, value in {
                **own,
                **{f"--{name}": value for name, value in asdict(self.load).items()},
            }.items()
        }

    def describe(self) -> str:
        lines = [
            f"{name:12} {value}"
            for name, value in self.facts().items()
            if name not in ("reasons", "planner")
        ]
        table = self.auto.text() if self.auto is not None else []
        return "\n".join(
            [*lines, *(f"because      {reason}" for reason in self.facts()["reasons"]), *table]
        )


def plan_start(
    settings: Settings,
    table: ModelTable,
    *,
    num_gpus: int,
    num_ranks: int | None = None,
    capability: tuple[int, int] | None = None,
    gpu_memory: int | None = None,
    recall: Recall = lambda key: None,
) -> StartPlan:
    """Resolve the plan. ConfigError, UnsupportedError or PlanError for what the user must change.

    num_ranks: where it is known already (in a rank); else --nproc_per_node, the GPUs, or 1. recall:
    what --backend=auto has measured before. capability: of the oldest GPU, and gpu_memory: bytes of
    the smallest one, if they are known.
    """
    _require_key(settings)
    _require_machines(settings)
    settings, hub = locate_names(settings)
    facts = {"num_gpus": num_gpus, "num_ranks": num_ranks}
    facts |= {"capability": capability, "gpu_memory": gpu_memory}
    try:
        spec, why_type = _model_spec(settings, table)
        settings, hub, why_parts = locate_configuration(settings, spec, hub)
        checkpoint = open_checkpoint(
            spec, checkpoint_path(settings, spec), config=settings.checkpoint_config
        )
        spec = replace(spec, sampler=sampler_config(checkpoint))
        spec, why_defaults = with_own_defaults(spec, checkpoint, hub.short_names(settings))
        spec = with_own_sizes(spec, checkpoint)
        spec = with_own_extent(spec, checkpoint, motion=settings.motion_adapter)
        spec = replace(spec, own=_own_class(settings, spec, checkpoint))
        start = _plan_files(settings, spec, recall=recall, **facts)
    except HostError as error:
        raise type(error)(hub.named(str(error))) from error
    return replace(
        start,
        reasons=(*filter(None, (why_type, why_parts, why_defaults)), *start.reasons),
        hub=hub.for_variant(start.load.variant, spec.denoiser),
    )


def _plan_files(
    settings: Settings,
    spec: ModelSpec,
    *,
    num_gpus: int,
    num_ranks: int | None,
    capability: tuple[int, int] | None,
    gpu_memory: int | None,
    recall: Recall,
) -> StartPlan:
    """Resolve the plan of settings that name files on this machine only."""
    checkpoint = checkpoint_path(settings, spec)
    ranks, why_ranks = _ranks(settings, num_ranks=num_ranks, num_gpus=num_gpus)
    world_size = ranks * settings.nnodes
    features = features_of(settings)
    gpus = {"num_gpus": num_gpus, "capability": capability}
    work = estimate_work(settings, spec, checkpoint=Path(checkpoint), **gpus)
    division = decide_division(settings, world_size, work, memory_bytes=gpu_memory)
    if "denoiser" in division.groups:
        settings = replace(settings, shard="always")
    if division.placement != "every":
        settings = replace(settings, encoder_placement=division.placement)
    choice = resolve_backend(
        settings,
        spec,
        world_size,
        checkpoint=Path(checkpoint),
        features=features,
        recall=recall,
        **gpus,
    )
    backend, settings = choice.backend, choice.settings
    for feature in ("", *features):
        spec.require(backend, feature or None)
    folder = configuration_folder(checkpoint, settings.checkpoint_config)
    options = {**settings.given, "checkpoint": str(folder)}
    plan = require_world_size(planner(backend)(spec, options, world_size), world_size)
    load, why_load = _load_request(settings, spec, plan, **gpus)
    divided = divided_groups(plan, division.placement, division.groups)
    load = replace(load, divided=divided, encoder_placement=division.placement)
    require_whole_weights(settings, plan)
    fitting = require_fit(spec, load)
    prediction = prediction_settings(spec, load, fitting)
    spec, why_mask = with_mask_inputs(
        spec,
        load,
        channels=denoiser_channels(fitting, load),
        latents=latent_channels(fitting.config("vae")),
    )
    why_prediction = (f"{name}={value}: the file says so" for name, value in prediction.items())
    if load.step_cache is not None:
        require_step_cache(load.step_cache, plan)
    auto = choice.auto
    teams = choose_teams(
        settings.mode,
        spec,
        plan,
        options,
        features=features,
        load=load,
        chosen=auto.teams if auto is not None else None,
        fastest=auto.job.candidate.ranks if auto is not None else None,
    )
    if auto is None and settings.quality is not None:
        _require_quality(settings.quality, plan)
    methods = _methods(plan, teams, auto)
    max_batch, why_one = batch_limit(settings.max_batch, settings.mode, spec, plan, teams, load)
    idle = idle_reasons(settings, spec, plan)
    reasons = (
        *why_ranks, division.why, *choice.reasons, *why_load, *why_prediction, why_mask, *idle,
        *foreign_loras(load, spec), why_one,
    )  # fmt: skip
    return StartPlan(
        spec=spec,
        plan=plan,
        load=load,
        weight_bytes=work.weight_bytes + work.other_bytes,
        num_ranks=ranks,
        reasons=tuple(filter(None, reasons)),
        teams=teams,
        max_batch=max_batch,
        auto=auto,
        methods=methods,
    )


def _require_quality(asked: Quality, plan: ParallelPlan) -> None:
    """ConfigError if the method that was named at launch does not meet --quality."""
    if not is_met(asked, plan.quality, num_steps=FEW_STEPS):
        raise ConfigError(
            f"--quality={asked} is not available with {plan.describe()}, which is {plan.quality}. "
            "Leave one of them out, or name an exact method."
        )


def _methods(plan: ParallelPlan, teams: Teams, auto: BackendChoice | None) -> Methods:
    """Return what may be attached on all ranks and on teams."""
    named = Methods.named(plan, *teams.plans.values())
    if auto is None:
        return named
    sizes = named.of_size
    return Methods(
        of_size={size: auto.methods[size] or sizes[size] for size in sizes},
        quality=auto.quality,
        measured=auto.measured,
    )


def _ranks(
    settings: Settings, *, num_ranks: int | None, num_gpus: int
) -> tuple[int, tuple[str, ...]]:
    """The number of ranks on this machine, with the reason if it was chosen."""
    ranks, reasons = num_ranks or settings.nproc_per_node, ()
    if ranks is None:
        ranks = max(num_gpus, 1)
        reasons = (f"ranks={ranks}: {num_gpus} GPUs are visible",)
    if num_gpus and ranks > num_gpus:
        raise ConfigError(
            f"--nproc_per_node={ranks} is more than the {num_gpus} visible GPUs. Use at most "
            f"{num_gpus}."
        )
    return ranks, reasons


def within_reach(
    settings: Settings, problem: HostError | None
) -> tuple[Settings, HostError | None]:
    """Return how a host listens that answers even if it cannot serve, and why it cannot.

    Without a key, a host that other machines could reach says so on this machine only.
    """
    try:
        _require_key(settings)
    except ConfigError as error:
        return replace(settings, host="127.0.0.1"), problem or error
    return settings, problem


def _require_key(settings: Settings) -> None:
    has_key = settings.api_key is not None or settings.api_keys is not None
    if settings.share_jobs and settings.api_keys is None:
        raise ConfigError(
            "--share_jobs was given, but without --api_keys all clients share their jobs. Give "
            "that too, or leave it out."
        )
    if settings.host not in LOOPBACK_NAMES and not has_key:
        raise ConfigError(
            f"--host={settings.host} can be reached from other machines, so requests need a key. "
            "Give --api_key or --api_keys as well, or leave --host out."
        )


def _require_machines(settings: Settings) -> None:
    if settings.node_rank >= settings.nnodes:
        raise ConfigError(
            f"--node_rank={settings.node_rank} is not one of --nnodes={settings.nnodes} machines. "
            f"Allowed: 0 to {settings.nnodes - 1}."
        )
    if settings.rdzv_endpoint is None and settings.nnodes > 1:
        raise ConfigError(
            f"--nnodes={settings.nnodes} needs --rdzv_endpoint. Give HOST:PORT, the address of the "
            "first machine and a free port there."
        )
    if settings.rdzv_key is None and settings.nnodes > 1:
        raise ConfigError(
            f"--nnodes={settings.nnodes} needs --rdzv_key, a secret of at least 16 characters that "
            "all machines have in common. Give all of them the same --rdzv_key=@FILE."
        )


def _model_spec(settings: Settings, table: ModelTable) -> tuple[ModelSpec, str]:
    """The row of --type, or of what the checkpoint is, with the reason."""
    name, reason = settings.type, ""
    if name is None and settings.checkpoint is None:
        raise ConfigError(
            "--type is missing. Give it, or a --checkpoint that says what it is. Allowed: "
            f"{', '.join(table)}."
        )
    if name is None:
        checkpoint = Path(existing_path("checkpoint", settings.checkpoint))
        has_motion = settings.motion_adapter is not None or settings.motion_module is not None
        name, reason = infer_type(checkpoint, table, has_motion=has_motion)
        if name != GENERIC and (misfit := misfit_of(table[name], checkpoint)):
            name, reason = GENERIC, f"type={GENERIC}, not {name}: {misfit}"
    if name == GENERIC:
        return _generic_spec(settings), reason
    spec = table[name]
    if settings.checkpoint is None and not spec.demo:
        with_demo = ", ".join(name for name, other in table.items() if other.demo)
        raise ConfigError(
            f"--checkpoint is missing: type {spec.name!r} has no demo model. Give the folder of "
            f"{with_article(spec.title)} model in diffusers layout "
            f"(a demo model comes with: {with_demo})."
        )
    if settings.checkpoint is None:
        spec = replace(
            spec, **{name: value for name, value in spec.demo.items() if name != "checkpoint"}
        )
    return spec, reason


OVERRULED_BY = "ip_adapter control_net compel step_cache motion_adapter motion_module".split()
"""Arguments that only the class of a row knows, or that change its components."""


def _own_class(settings: Settings, spec: ModelSpec, checkpoint: Checkpoint) -> ModelSpec | None:
    overruled = any(getattr(settings, name) for name in OVERRULED_BY)
    own = own_class(checkpoint) if not overruled and offload(settings) is None else None
    if own is None:
        return None
    own = replace(own, size_multiple=spec.size_multiple, frame_step=spec.frame_step)
    return with_own_extent(own, checkpoint)


def _generic_spec(settings: Settings) -> ModelSpec:
    """The facts of a folder whose class has no row. ConfigError if it is no folder of diffusers."""
    checkpoint = existing_path("checkpoint", settings.checkpoint)
    if checkpoint is None or not Path(checkpoint).is_dir():
        raise ConfigError(
            f"--type={GENERIC} needs a --checkpoint that is a folder in diffusers layout, but "
            f"{settings.checkpoint or 'none'} was given. Give such a folder."
        )
    return generic_spec(Path(checkpoint))


def _load_request(
    settings: Settings,
    spec: ModelSpec,
    plan: ParallelPlan,
    *,
    num_gpus: int,
    capability: tuple[int, int] | None,
) -> tuple[LoadRequest, list[str]]:
    reasons = []
    paths = {
        name: existing_path(name, getattr(settings, name)) for name in ("checkpoint", *PATH_OPTIONS)
    }
    scaled = {name: existing_files(name, getattr(settings, name)) for name in SCALED_PATHS}
    if settings.controlnet_scale is not None:
        scaled["control_net"] = dict.fromkeys(scaled["control_net"], settings.controlnet_scale)
    paths["checkpoint"] = checkpoint_path(settings, spec)
    if settings.checkpoint is None:
        reasons.append("checkpoint: the demo model, because none was given")
    require_components(spec, paths)
    variant = settings.variant
    if variant is None:
        variant, why = default_variant(spec, num_gpus=num_gpus, capability=capability)
        reasons.append(f"variant={variant}: {why}")
    try:
        scheduler = settings.scheduler or _scheduler_of(spec, settings)
        parse_at_launch(scheduler, SampledModel.by(spec))
    except RequestError as error:
        raise ConfigError(f"--scheduler: {error}") from error
    denoiser, denoiser_config = denoiser_files(settings, spec)
    load = LoadRequest(
        model_type=spec.name,
        checkpoint=paths["checkpoint"],
        checkpoint_config=existing_path("checkpoint_config", settings.checkpoint_config),
        variant=variant,
        scheduler=scheduler,
        vae=paths["vae"],
        vae_config=paths["vae_config"],
        denoiser=denoiser,
        denoiser_config=denoiser_config,
        gguf_model=paths["gguf_model"],
        motion_adapter=paths["motion_adapter"],
        motion_module=paths["motion_module"],
        motion_config=paths["motion_config"],
        control_net=scaled["control_net"],
        control_net_config=paths["control_net_config"],
        ip_adapter=scaled["ip_adapter"],
        lora=scaled["lora"],
        upscalers=dict(upscaler_files(settings.upscalers)),
        motion_lora=scaled["motion_adapter_lora"] if "motion_adapter" in spec.components else {},
        quantize=quantization(settings),
        compile=compile_settings(settings),
        compel=settings.compel,
        step_cache=step_cache(settings, spec, plan),
        offload=offload(settings),
        enable_attention_slicing=slices_attention(settings, plan),
        xformers_efficient=settings.xformers_efficient and not plan.intercepts_sdpa,
        enable_vae_tiling=settings.enable_vae_tiling,
        enable_vae_slicing=settings.enable_vae_slicing,
        parallel_vae=settings.parallel_vae is not False,
        height=settings.height,
        width=settings.width,
        prewarm_steps=prewarm_steps(settings, plan)[0],
    )
    return load, [*reasons, *load_reasons(settings, spec, plan, num_gpus=num_gpus)]


def _scheduler_of(spec: ModelSpec, settings: Settings) -> dict[str, Any] | None:
    """Return the sampler of a few-step checkpoint, unless a folder has it in its configuration."""
    replaced = any(getattr(settings, option) for option in NAMED_OPTIONS if option != "checkpoint")
    is_file = settings.checkpoint is not None and Path(settings.checkpoint).is_file()
    return dict(spec.scheduler) if spec.scheduler and (is_file or replaced) else None

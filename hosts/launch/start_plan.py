"""Settings + model table -> what will be started: model type, backend, plan, number of ranks, load
request. Imports no torch.

The launcher does this before any process starts, and every rank does it again with the same result.
"""

import glob
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from backends import planner
from backends.errors import ConfigError, HostError, RequestError
from backends.generation.schedulers import parse_scheduler, require_family
from backends.model_table import ModelSpec, ModelTable
from backends.plan import ParallelPlan, require_world_size
from backends.request import LoadRequest
from backends.step_cache_spec import require_step_cache
from hosts.launch.auto_backend import BackendChoice, Recall, decide, is_automatic
from hosts.launch.load_options import WITHOUT_SDPA, step_cache, treatments
from hosts.launch.settings import Settings, option_fields
from hosts.launch.team_modes import Teams, batch_limit, choose_teams

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
REPOSITORY = Path(__file__).resolve().parents[2]
PATH_OPTIONS = (
    "vae",
    "vae_config",
    "gguf_model",
    "motion_adapter",
    "motion_module",
    "motion_config",
    "control_net_config",
)
SCALED_PATHS = ("lora", "motion_adapter_lora", "control_net", "ip_adapter")
WEIGHT_FILES = (".safetensors", ".sft", ".bin", ".pt", ".pth", ".ckpt")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class StartPlan:
    """Everything that is decided before a process starts. num_ranks: on this machine; reasons: why
    each automatic choice was made.
    """

    spec: ModelSpec
    plan: ParallelPlan
    load: LoadRequest
    num_ranks: int
    reasons: tuple[str, ...]
    teams: Teams
    max_batch: int = 1
    auto: BackendChoice | None = None

    @property
    def job_plan(self) -> ParallelPlan:
        """What an image is made with that comes alone."""
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
            "checkpoint": self.load.checkpoint,
            "variant": self.load.variant,
            "height": self.load.height or self.spec.height,
            "width": self.load.width or self.spec.width,
            "reasons": [*self.reasons, *self.plan.reasons, *self.teams.reasons],
            **({"planner": self.auto.facts()} if self.auto is not None else {}),
        }

    def fingerprint(self, settings: Settings) -> dict[str, str]:
        """What must be the same on all machines of one host, by argument."""
        own = {
            "--nnodes": settings.nnodes,
            "--nproc_per_node": self.num_ranks,
            "--mode": settings.mode,
            "the plan": self.plan.describe(),
        }
        return {
            name: str(value)
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
    recall: Recall = lambda key: None,
) -> StartPlan:
    """The resolved plan. ConfigError, UnsupportedError or PlanError for whatever the user must
    change.

    num_ranks: where it is known already (in a rank); else --nproc_per_node, the GPUs, or 1. recall:
    what --backend=auto goes by.
    """
    refuse_pending(settings)
    _require_key(settings)
    _require_machines(settings)
    spec = _model_spec(settings, table)
    reasons = []
    ranks = num_ranks or settings.nproc_per_node
    if ranks is None:
        ranks = max(num_gpus, 1)
        reasons.append(f"ranks={ranks}: {num_gpus} GPUs are visible")
    world_size = ranks * settings.nnodes
    if num_gpus and ranks > num_gpus:
        raise ConfigError(
            f"--nproc_per_node={ranks} is more than the {num_gpus} visible GPUs. Use at most "
            f"{num_gpus}."
        )
    backend, auto = settings.backend, None
    features = tuple(
        feature
        for feature, names in FEATURE_OPTIONS.items()
        if any(name in settings.given for name in names)
    )
    if is_automatic(settings, spec, world_size):
        checkpoint = Path(_checkpoint(settings, spec))
        facts = {
            "world_size": world_size,
            "num_gpus": num_gpus,
            "features": features,
            "recall": recall,
        }
        auto = decide(settings, spec, checkpoint=checkpoint, **facts)
        backend, settings = (
            auto.world.candidate.backend,
            _for_any_method(replace(settings, **auto.world.candidate.options), reasons),
        )
        reasons.append(auto.reason)
    elif backend in (None, "auto"):
        backend = spec.default_backend(world_size)
        reasons.append(
            f"backend={backend}: first choice of type {spec.name!r} on {world_size} "
            f"rank{'s' if world_size > 1 else ''}"
        )
    elif world_size == 1 and backend != "single":
        reasons.append(f"one rank: backend {backend} computes what single does")
        spec.require(backend)
        backend = "single"
    spec.require(backend)
    for feature in features:
        spec.require(backend, feature)
    load = _load_request(settings, spec, backend, num_gpus=num_gpus, reasons=reasons)
    reasons += _without_effect(settings, spec, backend)
    options = {**settings.given, "checkpoint": load.checkpoint}
    plan = require_world_size(planner(backend)(spec, options, world_size), world_size)
    if load.step_cache is not None:
        require_step_cache(load.step_cache, plan)
    chosen = (
        {"chosen": auto.teams, "quickest": auto.job.candidate.ranks} if auto is not None else {}
    )
    teams = choose_teams(settings.mode, spec, plan, options, features=features, load=load, **chosen)
    max_batch, why_one = batch_limit(settings.max_batch, settings.mode, spec, plan, teams, load)
    reasons += [why_one] if why_one else []
    told = {
        "num_ranks": ranks,
        "reasons": tuple(reasons),
        "teams": teams,
        "max_batch": max_batch,
        "auto": auto,
    }
    return StartPlan(spec=spec, plan=plan, load=load, **told)


def _for_any_method(settings: Settings, reasons: list[str]) -> Settings:
    """Without what some methods cannot have: the choice is made again when the model is loaded, and
    teams may use others.
    """
    for name in WITHOUT_SDPA:
        if getattr(settings, name):
            reasons.append(
                f"--{name} has no effect with --backend=auto: most methods reach the other ranks "
                "through torch's own attention"
            )
    return replace(settings, **dict.fromkeys(WITHOUT_SDPA, False))


def _require_key(settings: Settings) -> None:
    if settings.host not in LOOPBACK_NAMES and settings.api_key is None:
        raise ConfigError(
            f"--host={settings.host} can be reached from other machines: give --api_key as well, "
            "which every request must then bring, "
            "or leave --host out."
        )


def _require_machines(settings: Settings) -> None:
    if settings.node_rank >= settings.nnodes:
        raise ConfigError(
            f"--node_rank={settings.node_rank} is not one of --nnodes={settings.nnodes} machines. "
            f"Allowed: 0 to {settings.nnodes - 1}."
        )
    if settings.rdzv_endpoint is None and settings.nnodes > 1:
        raise ConfigError(
            f"--nnodes={settings.nnodes} needs --rdzv_endpoint=HOST:PORT: the first machine's "
            "address and a free port there."
        )


def refuse_pending(settings: Settings) -> None:
    """An option that does not work yet is an error, never ignored."""
    for name in settings.given:
        if reason := option_fields()[name].metadata["pending"]:
            raise ConfigError(f"--{name} was given, but {reason}. Leave it out.")


def count_gpus(environment: Mapping[str, str]) -> int:
    """GPUs that the ranks will see, without importing torch: NVIDIA's, less what
    CUDA_VISIBLE_DEVICES hides.
    """
    present = len(glob.glob("/proc/driver/nvidia/gpus/*"))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    return min(
        present, len([part for part in visible.split(",") if part.strip() and part.strip() != "-1"])
    )


def _without_effect(settings: Settings, spec: ModelSpec, backend: str) -> list[str]:
    """A sentence for each given option of another backend than the one that runs. Clients send them
    all along.
    """
    declared = option_fields()
    idle = (
        ()
        if "motion_adapter" in spec.components
        else [name for name in MOTION_OPTIONS if name in settings.given]
    )
    return [
        f"--{name} has no effect: type {spec.name!r} has no motion adapter" for name in idle
    ] + [
        f"--{name} has no effect: it is for backend "
        f"{' or '.join(declared[name].metadata['backends'])}"
        for name in settings.given
        if declared[name].metadata["backends"]
        and backend not in declared[name].metadata["backends"]
    ]


def _model_spec(settings: Settings, table: ModelTable) -> ModelSpec:
    if settings.type is None:
        raise ConfigError(f"--type is missing. Allowed: {', '.join(table)}.")
    spec = table[settings.type]
    if settings.checkpoint is None and not spec.demo:
        with_demo = ", ".join(name for name, other in table.items() if other.demo)
        raise ConfigError(
            f"--checkpoint is missing: type {spec.name!r} has no demo model. Give the folder of a "
            f"{spec.title} model in diffusers layout "
            f"(a demo model comes with: {with_demo})."
        )
    if settings.checkpoint is None:
        spec = replace(
            spec, **{name: value for name, value in spec.demo.items() if name != "checkpoint"}
        )
    return spec


def _load_request(
    settings: Settings, spec: ModelSpec, backend: str, *, num_gpus: int, reasons: list[str]
) -> LoadRequest:
    paths = {
        name: _existing_path(name, getattr(settings, name))
        for name in ("checkpoint", *PATH_OPTIONS)
    }
    scaled = {name: _existing_files(name, getattr(settings, name)) for name in SCALED_PATHS}
    if settings.controlnet_scale is not None:
        scaled["control_net"] = dict.fromkeys(scaled["control_net"], settings.controlnet_scale)
    paths["checkpoint"] = _checkpoint(settings, spec)
    if settings.checkpoint is None:
        reasons.append("checkpoint: none was given, so the demo model")
    _require_components(spec, paths)
    variant = settings.variant
    if variant is None:
        variant = "fp16" if num_gpus else "fp32"
        reasons.append(f"variant={variant}: {'GPUs are there' if num_gpus else 'no GPU'}")
    try:
        require_family(parse_scheduler(settings.scheduler), flow=spec.flow_matching)
    except RequestError as error:
        raise ConfigError(f"--scheduler: {error}") from error
    return LoadRequest(
        model_type=spec.name,
        variant=variant,
        scheduler=settings.scheduler,
        height=settings.height,
        width=settings.width,
        enable_vae_tiling=settings.enable_vae_tiling,
        enable_vae_slicing=settings.enable_vae_slicing,
        parallel_vae=settings.parallel_vae is not False,
        lora=scaled["lora"],
        motion_lora=scaled["motion_adapter_lora"] if "motion_adapter" in spec.components else {},
        control_net=scaled["control_net"],
        ip_adapter=scaled["ip_adapter"],
        compel=settings.compel,
        step_cache=step_cache(settings, spec, backend=backend, reasons=reasons),
        **treatments(settings, backend=backend, reasons=reasons, num_gpus=num_gpus),
        **_denoiser(settings, spec),
        **paths,
    )


def _checkpoint(settings: Settings, spec: ModelSpec) -> str:
    return _existing_path("checkpoint", settings.checkpoint) or str(
        REPOSITORY / spec.demo["checkpoint"]
    )


def _existing_path(name: str, value: str | None) -> str | None:
    """Absolute and normalised: clients send paths such as <root>/custom_nodes/../models/x."""
    if value is None:
        return None
    path = Path(value).expanduser().resolve()
    if not path.exists():
        raise ConfigError(
            f"--{name}={value} does not exist. Give the path of a file or folder on this machine."
        )
    return str(path)


def _existing_files(name: str, scales: Mapping[str, float] | None) -> dict[str, float]:
    """The same with absolute paths, in the same order. A folder is allowed for a ControlNet
    only.
    """
    found = {}
    for value, scale in (scales or {}).items():
        path = _existing_path(name, value)
        if Path(path).is_file() and Path(path).suffix not in WEIGHT_FILES:
            raise ConfigError(
                f"--{name}={value} is no file of weights. Allowed: {', '.join(WEIGHT_FILES)}."
            )
        if Path(path).is_dir() and name != "control_net":
            raise ConfigError(
                f"--{name}={value} is a folder. Give the file of weights in it "
                f"({', '.join(WEIGHT_FILES)})."
            )
        if not math.isfinite(scale):
            raise ConfigError(f"--{name}={value} has scale {scale}. Give a finite number.")
        found[path] = scale
    return found


def _denoiser(settings: Settings, spec: ModelSpec) -> dict[str, str | None]:
    """The replacement for the type's own kind of denoiser, which may not come from two places."""
    other = "transformer" if spec.denoiser == "unet" else "unet"
    paths = {"unet": settings.unet, "transformer": settings.transformer}
    configs = {"unet": settings.unet_config, "transformer": settings.transformer_config}
    if paths[other] is not None:
        raise ConfigError(
            f"--{other} was given, but type {spec.name!r} has a {spec.denoiser}. Give "
            f"--{spec.denoiser}."
        )
    if paths[spec.denoiser] is not None and settings.gguf_model is not None:
        raise ConfigError(
            f"--{spec.denoiser} and --gguf_model were given, and both replace the {spec.denoiser}. "
            "Give one of them."
        )
    return {
        "denoiser": _existing_path(spec.denoiser, paths[spec.denoiser]),
        "denoiser_config": _existing_path(f"{spec.denoiser}_config", configs[spec.denoiser]),
    }


def _require_components(spec: ModelSpec, paths: Mapping[str, str | None]) -> None:
    checkpoint = Path(paths["checkpoint"] or "")
    if checkpoint.is_dir() and not (checkpoint / "model_index.json").is_file():
        raise ConfigError(
            f"--checkpoint={checkpoint} holds no model_index.json. Give a folder in diffusers "
            "layout."
        )
    if checkpoint.is_file() and not (spec.single_file and checkpoint.suffix == ".safetensors"):
        raise ConfigError(
            f"--checkpoint={checkpoint} is a file, but type {spec.name!r} needs a folder in "
            "diffusers layout."
        )
    for component in spec.components:
        if (
            paths.get(component) is None
            and paths.get("motion_module") is None
            and not (checkpoint / component).is_dir()
        ):
            raise ConfigError(
                f"type {spec.name!r} needs a {component}, and the checkpoint holds none. Give "
                f"--{component}=FOLDER or --motion_module=FILE."
            )


def as_config_error(error: HostError) -> ConfigError:
    """Whatever was wrong at start is the user's to change there."""
    return error if isinstance(error, ConfigError) else ConfigError(str(error))

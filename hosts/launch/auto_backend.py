"""Which backend a launch uses. --backend=auto: its choice, the reasons, and the measurements kept
for the next launch. Imports no torch.

The launcher and `--check` choose by the measurements of an earlier launch, or else by the
checkpoint's configuration. Without such measurements the ranks benchmark the candidates once the
model is loaded (hosts/ranks/autotune.py), and choose again.
"""

import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from backends.autotune.candidates import Candidate, list_candidates
from backends.autotune.cost import Work
from backends.autotune.estimate import DEVICES, estimate_checkpoint
from backends.autotune.ranking import Image, Measured, Row, as_text, choose, rank, require_any
from backends.errors import ConfigError
from backends.files.checkpoint import configuration_folder
from backends.main_memory import main_memory
from backends.model_table import ModelSpec
from backends.plan import QUALITIES, ParallelPlan
from backends.step_cache_spec import parse_step_cache, require_step_cache
from hosts.launch.gpus import default_variant
from hosts.launch.load_options import OFFLOADS, WITHOUT_SDPA, require_whole_weights
from hosts.launch.methods import worth_preparing
from hosts.launch.settings import Settings, options
from hosts.launch.sharding import CHANGES_SIZES, require_all_ranks, require_same_blocks

Recall = Callable[[str], Measured | None]
"""Return what an earlier launch with this key has measured."""
COMPILES = ("compile_unet", "compile_vae", "compile_text_encoder")
SECTIONS_IN_KEY = ("model", "adapters", "quantization", "memory", "old")
PACKAGES_IN_KEY = ("torch", "diffusers", "diffusion-launcher")
FOLDER = "plans"


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendChoice:
    """The choice of --backend=auto."""

    rows: tuple[Row, ...]
    """All candidates, as a table."""
    job: Row
    """The one for an image that arrives alone."""
    world: Row
    """The one of all ranks: the same, unless fewer ranks are faster."""
    teams: Mapping[int, ParallelPlan] = field(default_factory=dict)
    """Each smaller number of ranks -> its fastest plan."""
    methods: Mapping[int, Mapping[str, Candidate]] = field(default_factory=dict)
    """Number of ranks -> name -> method that is the best one for some request."""
    measured: Measured
    """The figures behind the choice."""
    quality: str
    levels: Mapping[str, str] = field(default_factory=dict)
    """Quality -> the best method of an image of the usual size and steps."""
    key: str
    """Names the kept measurements that fit this launch."""

    @property
    def source(self) -> str:
        if self.measured.steps:
            return f"measured {self.measured.date}".strip()
        return "estimated from the checkpoint's configuration; measured once it is loaded"

    @property
    def reason(self) -> str:
        return (
            f"method={self.job.candidate.name}: {self.job.image_s:.3g} s for the steps of an "
            f"image, {self.source}"
        )

    def facts(self) -> dict[str, Any]:
        return {
            "quality": self.quality,
            "source": self.source,
            "choice": self.job.candidate.name,
            "levels": dict(self.levels),
            "link": {
                "latency_s": self.measured.link.latency_s,
                "bytes_per_s": self.measured.link.bytes_per_s,
            },
            "table": [row.facts() for row in self.rows],
        }

    def text(self) -> list[str]:
        return [
            f"methods, {self.source} (--quality={self.quality}):",
            *as_text(self.rows, self.job),
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedBackend:
    """The backend of all ranks together, and the settings with the options of that choice."""

    backend: str
    settings: Settings
    auto: BackendChoice | None = None
    reasons: tuple[str, ...] = ()


def resolve_backend(
    settings: Settings,
    spec: ModelSpec,
    world_size: int,
    *,
    checkpoint: Path,
    num_gpus: int,
    capability: tuple[int, int] | None,
    features: tuple[str, ...],
    recall: Recall,
) -> ResolvedBackend:
    """The named backend, the choice of --backend=auto, or the model type's first one."""
    backend = settings.backend
    if is_automatic(settings, spec, world_size):
        auto = decide(
            settings,
            spec,
            checkpoint=checkpoint,
            world_size=world_size,
            num_gpus=num_gpus,
            capability=capability,
            features=features,
            recall=recall,
        )
        chosen, reasons = _for_any_method(replace(settings, **auto.world.candidate.options))
        return ResolvedBackend(
            backend=auto.world.candidate.backend,
            settings=chosen,
            auto=auto,
            reasons=(*reasons, auto.reason),
        )
    if backend in (None, "auto"):
        backend = spec.default_backend(world_size)
        reason = (
            f"backend={backend}: first choice of type {spec.name!r} on {world_size} "
            f"rank{'s' if world_size > 1 else ''}"
        )
        return ResolvedBackend(backend=backend, settings=settings, reasons=(reason,))
    if world_size == 1 and backend != "single":
        spec.require(backend)
        reason = f"one rank: backend {backend} computes what single does"
        return ResolvedBackend(backend="single", settings=settings, reasons=(reason,))
    return ResolvedBackend(backend=backend, settings=settings)


def _for_any_method(settings: Settings) -> tuple[Settings, tuple[str, ...]]:
    """Without the options that some methods cannot have: the choice is made again when the model is
    loaded, and teams may use other methods.
    """
    reasons = tuple(
        f"--{name} has no effect with --backend=auto: most methods reach the other ranks through "
        "torch's own attention"
        for name in WITHOUT_SDPA
        if getattr(settings, name)
    )
    return replace(settings, **dict.fromkeys(WITHOUT_SDPA, False)), reasons


def is_automatic(settings: Settings, spec: ModelSpec, world_size: int) -> bool:
    """Whether this launch leaves the method open: --backend=auto was given, or neither a backend
    nor an option of one, and there are several ranks, or one that may skip steps.

    ConfigError if --backend=auto was given with an option that it excludes.
    """
    asked = settings.backend == "auto"
    fixed = [name for name in settings.given if options()[name].backends]
    compiled = [name for name in COMPILES if getattr(settings, name)]
    if asked and fixed:
        raise ConfigError(
            f"--backend=auto chooses degrees and modes itself, but --{fixed[0]} was given. Leave "
            "that out, or name the backend: "
            f"{' or '.join(options()[fixed[0]].backends)}."
        )
    if asked and compiled:
        raise ConfigError(
            f"--backend=auto benchmarks several methods on the loaded model, and with "
            f"--{compiled[0]} each would compile it again. Leave it out, or name the backend: "
            f"{' or '.join(name for name in spec.backends if name != 'single')}."
        )
    num_backends = sum(
        row.cell.status != "unsupported" for name, row in spec.backends.items() if name != "single"
    )
    is_open = settings.backend is None and not fixed and not compiled and num_backends > 1
    is_open = is_open and not spec.is_generic  # a benchmark would need the inputs of its class
    # alone there is nothing to choose among exact methods, and step caches are not exact
    has_choice = world_size > 1 or settings.quality in ("high", "fast")
    return has_choice and settings.mode != "throughput" and (asked or is_open)


def decide(
    settings: Settings,
    spec: ModelSpec,
    *,
    checkpoint: Path,
    world_size: int,
    num_gpus: int,
    capability: tuple[int, int] | None,
    features: Sequence[str],
    recall: Recall,
) -> BackendChoice:
    """Return the choice for these settings. ConfigError, with the reason of each candidate, if none
    is left.
    """
    candidates = _candidates(
        settings, spec, checkpoint=checkpoint, world_size=world_size, features=features
    )
    key = key_of(settings, spec, checkpoint=checkpoint, world_size=world_size, num_gpus=num_gpus)
    gpus = {"num_gpus": num_gpus, "capability": capability}
    measured = recall(key) or _estimate(
        settings, spec, checkpoint=checkpoint, world_size=world_size, **gpus
    )
    image, quality = Image(num_steps=spec.num_inference_steps), settings.quality or "exact"
    sharded = {"image": image, "is_sharded": settings.shard == "always"}
    rows = rank(candidates, measured, quality=quality, **sharded)
    job, world = require_any(rows), choose(rows, ranks=world_size)
    if settings.mode == "latency":
        job = world = world or _refuse_ranks(rows, world_size)
    elif world is None:  # teams work at this quality, and all ranks together at another one
        others = rank(candidates, measured, quality="fast", **sharded)
        world = choose(others, ranks=world_size) or _refuse_ranks(rows, world_size)
    teams = {
        size: best.candidate.plan
        for size in range(1, world_size)
        if (best := choose(rows, ranks=size)) is not None
    }
    return BackendChoice(
        rows=tuple(rows),
        job=job,
        world=world,
        teams=teams,
        methods={
            size: worth_preparing(
                candidates,
                measured,
                ranks=size,
                quality=quality,
                num_steps=spec.num_inference_steps,
            )
            for size in sorted({*teams, world_size})
        },
        measured=measured,
        quality=quality,
        levels={
            level: best.candidate.name
            for level in QUALITIES
            if (best := choose(rank(candidates, measured, quality=level, image=image))) is not None
        },
        key=key,
    )


def halves_of(spec: ModelSpec) -> int:
    """Return the number of guidance halves at the type's defaults."""
    return 2 if spec.has_halves and spec.guidance_scale > 1 else 1


def candidates_of(auto: BackendChoice) -> list[Candidate]:
    """Return the candidates in an order that is the same on every machine."""
    return sorted((row.candidate for row in auto.rows), key=lambda candidate: candidate.name)


def key_of(
    settings: Settings, spec: ModelSpec, *, checkpoint: Path, world_size: int, num_gpus: int
) -> str:
    """Return a name for everything that measured times depend on."""
    given = {
        name: value
        for name, value in settings.given.items()
        if options()[name].section in SECTIONS_IN_KEY
    }
    facts = {
        "type": spec.name,
        "files": _files(checkpoint, spec.denoiser),
        "size": (spec.height, spec.width, spec.num_inference_steps),
        "options": given,
        "quality": settings.quality or "exact",
        "ranks": (world_size, settings.nnodes, num_gpus),
        "device": _device(),
        "versions": [version(package) for package in PACKAGES_IN_KEY],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def recall_from(folder: str | Path | None) -> Recall:
    """Return the reader of measurements in a state folder. Without a folder, or with an unreadable
    file, there are none.
    """

    def recall(key: str) -> Measured | None:
        if folder is None:
            return None
        try:
            return Measured.from_json(json.loads(_file(folder, key).read_text(encoding="utf-8")))
        except Exception:  # noqa: BLE001  whatever is wrong with the file, it is measured again
            return None

    return recall


def remember(folder: str | Path, key: str, measured: Measured) -> None:
    """Keep measurements for the next launch. If the folder cannot be written, that launch measures
    again.
    """
    file = _file(folder, key)
    with contextlib.suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(measured.to_json(), indent=1), encoding="utf-8")
        fresh.replace(file)


def _file(folder: str | Path, key: str) -> Path:
    return Path(folder).expanduser().resolve() / FOLDER / f"{key}.json"


def _candidates(
    settings: Settings,
    spec: ModelSpec,
    *,
    checkpoint: Path,
    world_size: int,
    features: Sequence[str],
) -> list[Candidate]:
    cache = parse_step_cache(settings.step_cache, spec) if settings.step_cache is not None else None

    def check(plan: ParallelPlan) -> None:
        if cache is not None:
            require_step_cache(cache, plan)
        if settings.shard == "always" or settings.encoder_placement not in ("auto", "every"):
            require_all_ranks(plan, world_size)
        if settings.shard == "always":
            require_same_blocks(plan)
        require_whole_weights(settings, plan)
        if plan.degree("tensor") > 1 and "lora" in features:
            raise ConfigError("it makes the LoRAs of the launch a part of the weights.")

    given = {
        **settings.given,
        "checkpoint": str(configuration_folder(checkpoint, settings.checkpoint_config)),
    }
    return list_candidates(
        spec,
        given,
        world_size,
        features=features,
        is_guided=halves_of(spec) == 2,
        check=check,
        # hooks of offloading would have to come off first
        has_caches=cache is None and not any(getattr(settings, name) for name in OFFLOADS),
    )


def estimate_work(
    settings: Settings,
    spec: ModelSpec,
    *,
    checkpoint: Path,
    num_gpus: int,
    capability: tuple[int, int] | None,
) -> Work:
    """Return the work of a step by the checkpoint's configuration."""
    return estimate_checkpoint(
        spec,
        checkpoint,
        folder=configuration_folder(checkpoint, settings.checkpoint_config),
        height=settings.height or spec.height,
        width=settings.width or spec.width,
        variant=settings.variant
        or default_variant(spec, num_gpus=num_gpus, capability=capability)[0],
        halves=halves_of(spec),
        device=DEVICES["gpu" if num_gpus else "cpu"],
    )


def _estimate(
    settings: Settings,
    spec: ModelSpec,
    *,
    checkpoint: Path,
    world_size: int,
    num_gpus: int,
    capability: tuple[int, int] | None,
) -> Measured:
    """Estimate the figures. --shard decides by a GPU's memory before, so it refuses no candidate
    here.
    """
    link = DEVICES["gpu" if num_gpus else "cpu"].link
    work = estimate_work(
        settings, spec, checkpoint=checkpoint, num_gpus=num_gpus, capability=capability
    )
    is_unsure = num_gpus or any(name in settings.given for name in CHANGES_SIZES)
    memory_bytes = main_memory().total * settings.nnodes // world_size
    return Measured(work=work, link=link, memory_bytes=None if is_unsure else memory_bytes)


def _refuse_ranks(rows: Sequence[Row], ranks: int) -> NoReturn:
    """ConfigError: the ranks need a plan for all of them before they may split."""
    reasons = "; ".join(
        f"{row.candidate.name}: {row.refusal.rstrip('.')}"
        for row in rows
        if row.candidate.ranks == ranks
    )
    raise ConfigError(
        f"no method uses all {ranks} ranks ({reasons or 'there is none'}). Start fewer with "
        "--nproc_per_node, or name a --backend and its degrees."
    )


def _files(checkpoint: Path, denoiser: str) -> list[tuple[str, int, int]]:
    """Name, size and time of the denoiser's files: a replaced checkpoint counts as another
    one.
    """
    folder = checkpoint / denoiser
    files = sorted(folder.iterdir()) if folder.is_dir() else [checkpoint]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _device() -> list[str]:
    """The names of the devices, by the driver or the kernel."""
    lines = []
    for source in (*sorted(glob.glob("/proc/driver/nvidia/gpus/*/information")), "/proc/cpuinfo"):
        with contextlib.suppress(OSError):
            text = Path(source).read_text(encoding="utf-8", errors="replace")
            lines += [
                line.split(":", 1)[1].strip()
                for line in text.splitlines()
                if line.startswith(("Model", "model name"))
            ][:1]
    return [*lines, str(os.cpu_count())]
